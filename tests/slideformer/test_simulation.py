"""Simulated timelines: laws that hold for any graph and policy, and small cases worked by hand."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slideformer.graph.analysis import critical_path
from slideformer.graph.buffers import Tier
from slideformer.graph.builder import GraphBuilder
from slideformer.graph.errors import ConfigError
from slideformer.graph.graph import TaskGraph
from slideformer.graph.machines import load_machine
from slideformer.graph.profile import MachineProfile
from slideformer.graph.step import compile_step
from slideformer.graph.tasks import Cost, Lane, TaskKind
from slideformer.memory.ledger import replay
from slideformer.simulation import SCHEDULER, simulate
from tests.support.graphs import task_graphs
from tests.support.specs import small_plan, small_spec

PROFILE = MachineProfile(launch=0.0)
POLICIES = st.sampled_from(["fifo", "critical-path", "earliest-deadline"])


@given(task_graphs(), POLICIES, st.integers(1, 3))
def test_makespan_is_at_least_the_critical_path_and_each_lane(
    graph: TaskGraph, policy: str, instances: int
) -> None:
    timeline = simulate(graph, PROFILE, policy, instances)
    assert len(timeline.spans) == instances * len(graph.tasks)
    seconds = {task.name: PROFILE.seconds(task) for task in graph.tasks}
    assert timeline.makespan >= sum(seconds[name] for name in critical_path(graph, PROFILE))
    for lane in Lane:
        total = sum(seconds[t.name] for t in graph.tasks if t.lane is lane)
        assert timeline.makespan >= instances * total
        assert timeline.busy(lane) == instances * total


@given(task_graphs(), POLICIES, st.integers(1, 3))
def test_no_task_starts_before_what_it_waits_for(
    graph: TaskGraph, policy: str, instances: int
) -> None:
    timeline = simulate(graph, PROFILE, policy, instances)
    for span in timeline.spans:
        assert all(s.stopped <= span.started for s in timeline.waited_for(span))


@given(task_graphs(), POLICIES, st.integers(1, 3))
def test_the_critical_path_explains_the_whole_makespan(
    graph: TaskGraph, policy: str, instances: int
) -> None:
    timeline = simulate(graph, PROFILE, policy, instances)
    path = timeline.critical_path()
    assert sum(span.seconds for span in path) == timeline.makespan
    for before, after in pairwise(path):
        assert before.stopped == after.started


@given(task_graphs(), POLICIES, st.integers(1, 3), st.integers(1, 3))
def test_idle_time_is_what_is_not_busy_and_all_of_it_has_a_cause(
    graph: TaskGraph, policy: str, instances: int, width: int
) -> None:
    profile = replace(PROFILE, widths={Lane.CPU: width})
    timeline = simulate(graph, profile, policy, instances)
    for lane in {task.lane for task in graph.tasks}:
        last = max(s.stopped for s in timeline.of_lane(lane))
        idle = sum(gap.stop - gap.start for gap in timeline.idle(lane))
        assert idle + timeline.busy(lane) == last - timeline.start
        exposed = timeline.exposed(lane)
        assert sum(exposed.values()) == idle
        assert SCHEDULER not in exposed  # these policies never leave a lane idle


@settings(max_examples=50)
@given(task_graphs(), POLICIES)
def test_peaks_lie_between_what_is_always_held_and_all_at_once(
    graph: TaskGraph, policy: str
) -> None:
    timeline = simulate(graph, PROFILE, policy)
    everything = {tier: 0 for tier in Tier}
    carried = {tier: 0 for tier in Tier}
    for item in (*graph.slots.values(), *graph.buffers.values()):
        if not getattr(item, "slot", ""):
            everything[item.tier] += item.nbytes
            if getattr(item, "carried", True):
                carried[item.tier] += item.nbytes
    for tier, peak in timeline.peaks().items():
        assert carried[tier] <= peak <= everything[tier]
        assert timeline.held(tier)[-1][1] == carried[tier]
        assert max(nbytes for _, nbytes in timeline.live(tier)) >= 0


def test_in_program_order_the_peaks_are_the_ledgers() -> None:
    b = GraphBuilder()
    for name, nbytes in (("x", 100), ("y", 10), ("z", 1)):
        b.buffer(name, nbytes, Tier.GPU)
    second = Cost(seconds=1.0)
    b.task("a.x", TaskKind.COMPUTE, writes=["x"], cost=second)
    b.task("b.y", TaskKind.COMPUTE, reads=["x"], writes=["y"], cost=second)
    b.task("c.z", TaskKind.COMPUTE, reads=["y"], writes=["z"], cost=second)
    graph = b.build()
    timeline = simulate(graph, PROFILE)
    assert timeline.held(Tier.GPU) == [(0.0, 100), (1.0, 110), (2.0, 11), (3.0, 0)]
    assert timeline.peaks() == {Tier.GPU: replay(graph).peak[Tier.GPU]} == {Tier.GPU: 110}


def chain() -> TaskGraph:
    """An update of 3 s, then a copy of 2 s, then 5 s of compute beside a first second of it."""
    b = GraphBuilder("chain")
    b.buffer("w", 8, Tier.PINNED, carried=True)
    b.buffer("g", 8, Tier.GPU)
    b.buffer("y", 8, Tier.GPU)
    b.task("warm.up", TaskKind.COMPUTE, writes=["y"], cost=Cost(seconds=1.0))
    b.task("update.w", TaskKind.CPU_UPDATE, reads=["w"], writes=["w"], cost=Cost(seconds=3.0))
    b.task("h2d.w", TaskKind.H2D, reads=["w"], writes=["g"], cost=Cost(seconds=2.0))
    b.task("fwd.w", TaskKind.COMPUTE, reads=["g", "y"], writes=["y"], cost=Cost(seconds=5.0))
    return b.build()


def test_a_gap_and_its_causes() -> None:
    timeline = simulate(chain(), PROFILE)
    assert timeline.makespan == 10.0
    [gap] = timeline.idle(Lane.COMPUTE)
    assert (gap.start, gap.stop, gap.task, gap.cause) == (1.0, 5.0, "fwd.w", "h2d.w")
    assert timeline.exposed() == {"CPU_UPDATE": 2.0, "H2D": 2.0}
    assert [s.task for s in timeline.critical_path()] == ["update.w", "h2d.w", "fwd.w"]
    assert timeline.utilisation() == {Lane.COMPUTE: 0.6, Lane.CPU: 0.3, Lane.H2D: 0.2}


def test_the_next_step_overlaps_this_one() -> None:
    timeline = simulate(chain(), PROFILE, instances=3)
    assert timeline.step_seconds == 7.0  # the next copy waits for its target to be read
    assert timeline.exposed() == {"CPU_UPDATE": 2.0, "H2D": 2.0 + 1.0 + 1.0}
    assert timeline.exposed(first=1) == {"H2D": 2.0}


def test_a_policy_that_waits_for_nothing_is_told_apart() -> None:
    class Hesitant:
        name = "hesitant"

        def prepare(self, graph: object, profile: object) -> None:
            self.refusals = 2

        def choose(self, lane: Lane, ready: Sequence[Any]) -> Any:
            if lane is Lane.COMPUTE and self.refusals:
                self.refusals -= 1
                return None
            return ready[0]

    timeline = simulate(chain(), PROFILE, Hesitant())
    first = timeline.idle(Lane.COMPUTE)[0]
    assert (first.task, first.cause) == ("warm.up", None)
    assert timeline.exposed() == {SCHEDULER: 3.0, "H2D": 1.0}


def test_a_step_is_simulated_by_name_also_inside_a_running_loop() -> None:
    graph = compile_step(small_spec(), small_plan())

    async def inside() -> float:
        return simulate(graph, "rtx4090", "fifo").makespan

    machine = load_machine("rtx4090")
    assert asyncio.run(inside()) == simulate(graph, machine, "fifo").makespan > 0
    assert asyncio.run(inside()) == simulate(graph, machine.profile, "fifo").makespan


@pytest.mark.parametrize(("machine", "policy"), [("rtx4091", "fifo"), ("h200", "lifo")])
def test_unknown_names_are_refused(machine: str, policy: str) -> None:
    with pytest.raises(ConfigError, match="did you mean"):
        simulate(chain(), machine, policy)


@pytest.mark.parametrize("instances", [0, -1, 1.5])
def test_a_number_of_instances_that_cannot_be_is_refused(instances: Any) -> None:
    with pytest.raises(ConfigError, match=f"instances is {instances}; it must be a whole number"):
        simulate(chain(), PROFILE, "fifo", instances)


def test_many_tasks_that_take_no_time_have_a_critical_path() -> None:
    b = GraphBuilder()
    for i in range(10_000):
        b.task(f"none.x{i}", TaskKind.CPU, cost=Cost(seconds=0.0))
    timeline = simulate(b.build(), PROFILE, "fifo")
    started = time.monotonic()
    assert len(timeline.critical_path()) == 10_000
    assert time.monotonic() - started < 3.0
