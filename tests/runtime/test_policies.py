"""What each policy prefers, and how policies are found by name."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slideformer.graph.buffers import Tier
from slideformer.graph.builder import GraphBuilder
from slideformer.graph.errors import ConfigError
from slideformer.graph.graph import TaskGraph
from slideformer.graph.plan import MachineProfile
from slideformer.graph.tasks import Cost, Lane, TaskKind
from slideformer.runtime import policies
from slideformer.runtime.core import Instance, TaskRun
from slideformer.runtime.policies import Fifo, make_policy, policy_names
from slideformer.runtime.simulated import simulate
from tests.support.graphs import step_like, task_graphs

PROFILE = MachineProfile()


def urgent_last() -> TaskGraph:
    """Two updates are ready at once; the GPU waits for the second, shorter one."""
    builder = GraphBuilder()
    weights = [builder.buffer(f"w{i}", 4, Tier.PINNED, carried=True) for i in range(2)]
    for i, seconds in enumerate((5.0, 1.0)):
        cost = Cost(seconds=seconds)
        builder.task(
            f"update.L{i}", TaskKind.CPU, reads=[weights[i]], writes=[weights[i]], cost=cost
        )
    up = builder.buffer("up", 4, Tier.GPU)
    builder.task("h2d.L1", TaskKind.H2D, reads=["w1"], writes=[up], cost=Cost(seconds=1.0))
    builder.task("fwd.L1", TaskKind.COMPUTE, reads=[up], cost=Cost(seconds=4.0))
    return builder.build()


@pytest.mark.parametrize(
    ("name", "makespan"),
    [
        ("fifo", 5.0 + 1.0 + 1.0 + 4.0),
        ("critical-path", 1.0 + 5.0),  # the long update hides behind the GPU's work
        ("earliest-deadline", 1.0 + 5.0),
    ],
)
def test_ranking_takes_first_what_the_gpu_waits_for(name: str, makespan: float) -> None:
    assert simulate(urgent_last(), make_policy(name), PROFILE).makespan == makespan


def test_the_earliest_deadline_shortens_a_step_by_updating_the_first_layer_first() -> None:
    """Three layers, updates of two seconds, two steps.

    Gradients land at 6, 7 and 8 s, that of layer 0 last. In order of arrival its update is done at
    12 s and the next forward begins at 13 s. By deadline it overtakes that of layer 1 and is done
    at 10 s; layer 1 follows at 12 s and lets its own forward wait for a second.
    """
    graph = step_like(3, update=2.0)

    def second_step(name: str) -> tuple[float, float]:
        timeline = simulate(graph, make_policy(name), PROFILE, instances=2)
        spans = {span.task: span for span in timeline.instance(1).spans}
        return spans["fwd.L0"].started, spans["bwd.L0"].stopped

    assert second_step("fifo") == (13.0, 19.0)
    assert second_step("earliest-deadline") == (11.0, 18.0)


@given(task_graphs(), st.sampled_from(policy_names()))
def test_a_policy_is_never_stuck_and_chooses_what_is_ready(graph: TaskGraph, name: str) -> None:
    timeline = simulate(graph, make_policy(name), PROFILE, instances=2)
    assert len(timeline.spans) == 2 * len(graph.tasks)


def ready_runs(graph: TaskGraph, numbers: list[int]) -> list[TaskRun]:
    """The first task of instances with these numbers, all of one graph."""
    return [TaskRun(Instance(n, graph), 0, graph.tasks[0], 0) for n in numbers]


@pytest.mark.parametrize("name", ["critical-path", "earliest-deadline"])
def test_of_two_instances_the_earlier_one_goes_first(name: str) -> None:
    graph = step_like(2)
    policy = make_policy(name)
    policy.prepare(graph, PROFILE)
    late, early = ready_runs(graph, [5, 4])
    assert policy.choose(Lane.H2D, [late, early]) is early


@pytest.mark.parametrize("name", policy_names())
def test_among_equals_the_one_ready_first_goes_first(name: str) -> None:
    builder = GraphBuilder()
    for i in range(3):
        builder.task(f"same.L{i}", TaskKind.CPU, cost=Cost(seconds=1.0))
    graph = builder.build()
    timeline = simulate(graph, make_policy(name), PROFILE)
    assert [span.task for span in timeline.spans] == ["same.L0", "same.L1", "same.L2"]


def test_names() -> None:
    assert {"fifo", "critical-path", "earliest-deadline"} <= set(policy_names())
    for name in policy_names():
        assert make_policy(name).name == name
        assert make_policy(name) is not make_policy(name), "each run has its own"


def test_an_unknown_name_is_told_the_nearest() -> None:
    with pytest.raises(ConfigError, match="'critical_path'; did you mean 'critical-path'\\?"):
        make_policy("critical_path")
    with pytest.raises(ConfigError, match="known: critical-path, earliest-deadline, fifo"):
        make_policy("xyz")


def test_a_third_party_policy_is_found_by_its_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("theirs", f"{Fifo.__module__}:Fifo", "slideformer.policies")

    def entry_points(*, group: str) -> list[EntryPoint]:
        assert group == "slideformer.policies"
        return [entry]

    monkeypatch.setattr(policies, "entry_points", entry_points)
    assert "theirs" in policy_names()
    assert isinstance(make_policy("theirs"), Fifo)
