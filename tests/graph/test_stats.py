"""Statistics of graphs against sums taken another way."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given

from slideformer.graph.buffers import Tier
from slideformer.graph.graph import TaskGraph
from slideformer.graph.profile import MachineProfile
from slideformer.graph.stats import graph_stats
from slideformer.graph.step import compile_step
from slideformer.graph.tasks import Lane, TaskKind
from tests.support.graphs import task_graphs
from tests.support.specs import small_plan, small_spec

PROFILE = MachineProfile()


@given(task_graphs())
def test_totals_agree(graph: TaskGraph) -> None:
    stats = graph_stats(graph, PROFILE)
    seconds = sum(PROFILE.seconds(task) for task in graph.tasks)
    for loads in (stats.kinds.values(), stats.lanes.values()):
        assert sum(load.tasks for load in loads) == stats.tasks == len(graph.tasks)
        assert sum(load.seconds for load in loads) == pytest.approx(seconds)
    assert stats.edges == sum(map(len, graph.edges.predecessors))
    assert stats.critical_seconds <= seconds + 1e-9
    assert stats.critical_seconds >= max(map(PROFILE.seconds, graph.tasks), default=0.0)


@given(task_graphs())
def test_the_critical_path_is_a_path(graph: TaskGraph) -> None:
    path = [graph.index[name] for name in graph_stats(graph, PROFILE).critical_path]
    for before, after in pairwise(path):
        assert after in graph.edges.successors[before]


def test_a_step_moves_each_weight_up_twice_at_most_and_updates_it_once() -> None:
    spec = small_spec()
    stats = graph_stats(compile_step(spec, small_plan()), PROFILE)
    params = sum(unit.numel for unit in spec.units)
    rows = 4 * 8 * spec.hidden
    assert stats.kinds[TaskKind.CPU_UPDATE].params == params + rows
    assert stats.lanes[Lane.CPU].params == stats.kinds[TaskKind.CPU_UPDATE].params
    assert 2 * params <= stats.lanes[Lane.H2D].nbytes <= 4 * params + 8 * 32 * 3 * 24
    assert stats.places[Tier.CPU] >= 10 * params
    assert Lane.NVME_READ not in stats.lanes
