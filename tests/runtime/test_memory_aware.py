"""The memory-aware policy: it saves memory where order decides it, and keeps count correctly."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slideformer.graph.buffers import Tier
from slideformer.graph.builder import GraphBuilder
from slideformer.graph.graph import TaskGraph
from slideformer.graph.profile import MachineProfile
from slideformer.graph.tasks import Cost, TaskKind
from slideformer.runtime.memory_aware import MemoryAware
from slideformer.runtime.runs import TaskRun
from slideformer.simulation import simulate
from tests.support.graphs import task_graphs

PROFILE = MachineProfile()


def fan(width: int) -> TaskGraph:
    """Large buffers, each made and reduced to a small one; in the program all are made first."""
    b = GraphBuilder("fan")
    for i in range(width):
        b.buffer(f"big{i}", 1000, Tier.GPU)
        b.buffer(f"small{i}", 1, Tier.GPU)
    second = Cost(seconds=1.0)
    for i in range(width):
        b.task(f"make.b{i}", TaskKind.COMPUTE, writes=[f"big{i}"], cost=second)
    for i in range(width):
        reads, writes = [f"big{i}"], [f"small{i}"]
        b.task(f"reduce.b{i}", TaskKind.COMPUTE, reads=reads, writes=writes, cost=second)
    smalls = [f"small{i}" for i in range(width)]
    b.task("sum.all", TaskKind.COMPUTE, reads=smalls, cost=second)
    return b.build()


def test_it_reduces_each_buffer_before_it_makes_the_next() -> None:
    graph = fan(8)
    fifo, aware = (simulate(graph, PROFILE, name) for name in ("fifo", "memory-aware"))
    assert fifo.peaks()[Tier.GPU] >= 8000
    assert aware.peaks()[Tier.GPU] <= 3008  # two are in flight on the lane
    assert aware.makespan == fifo.makespan


@given(task_graphs(), st.integers(1, 3))
def test_nothing_is_left_over_when_all_instances_are_done(graph: TaskGraph, instances: int) -> None:
    policy = MemoryAware()
    timeline = simulate(graph, PROFILE, policy, instances)
    assert len(timeline.spans) == instances * len(graph.tasks)
    [known] = policy._graphs.values()
    assert known.instances == {}


def test_many_readers_of_a_buffer_are_ranked_a_few_times_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    b = GraphBuilder()
    b.buffer("x", 4, Tier.CPU)
    b.task("make.x", TaskKind.CPU, writes=["x"])
    for i in range(300):
        b.task(f"read.x{i}", TaskKind.CPU, reads=["x"])
    ranked: list[TaskRun] = []
    rank = MemoryAware._rank

    def noted(policy: MemoryAware, run: TaskRun) -> tuple[int, int, int]:
        ranked.append(run)
        return rank(policy, run)

    monkeypatch.setattr(MemoryAware, "_rank", noted)
    simulate(b.build(), PROFILE, MemoryAware())
    assert max(Counter(ranked).values()) <= 3
