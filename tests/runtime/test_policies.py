"""What each policy prefers, and how policies are found by name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slideformer.graph.buffers import Tier
from slideformer.graph.builder import GraphBuilder
from slideformer.graph.errors import ConfigError, PolicyError
from slideformer.graph.graph import TaskGraph
from slideformer.graph.profile import MachineProfile
from slideformer.graph.tasks import Cost, Lane, TaskKind
from slideformer.runtime.policies import make_policy, policy_names
from slideformer.runtime.runs import Instance, TaskRun
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


def free_tasks(count: int) -> TaskGraph:
    """Tasks of one lane and one second each, none of which waits."""
    builder = GraphBuilder()
    for i in range(count):
        builder.task(f"same.L{i}", TaskKind.CPU, cost=Cost(seconds=1.0))
    return builder.build()


@pytest.mark.parametrize("name", policy_names())
def test_among_equals_the_one_ready_first_goes_first(name: str) -> None:
    timeline = simulate(free_tasks(3), make_policy(name), PROFILE)
    assert [span.task for span in timeline.spans] == ["same.L0", "same.L1", "same.L2"]


@pytest.mark.parametrize("method", ["prepare", "choose"])
def test_ctrl_c_while_a_policy_thinks_is_no_failure_of_the_policy(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy("fifo")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(policy, method, interrupted)
    with pytest.raises(KeyboardInterrupt):
        simulate(free_tasks(1), policy, PROFILE)


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


THEIRS = """
class Backwards:
    name = "backwards"
    def prepare(self, graph, profile): pass
    def choose(self, lane, ready): return ready[-1]

class Nothing: pass

def broken(): raise KeyError("no licence")

def leaving(): raise SystemExit(0)
"""
ENTRIES = """[slideformer.policies]
backwards = their_policies:Backwards
empty = their_policies:Nothing
broken = their_policies:broken
absent = their_policies:Absent
leaving = their_policies:leaving
"""


@pytest.fixture
def their_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A distribution with policies, as pip leaves one behind."""
    (tmp_path / "their_policies.py").write_text(THEIRS)
    info = tmp_path / "their_policies-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-policies\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRIES)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "their_policies", raising=False)


@pytest.mark.usefixtures("their_package")
def test_a_policy_of_an_installed_package_is_known_by_its_name() -> None:
    assert "backwards" in policy_names()
    order = [span.task for span in simulate(free_tasks(3), make_policy("backwards"), PROFILE).spans]
    assert order == ["same.L2", "same.L1", "same.L0"]
    with pytest.raises(ConfigError, match="'backward'; did you mean 'backwards'"):
        make_policy("backward")


@pytest.mark.usefixtures("their_package")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "broken",
            "'broken' cannot be loaded from 'their_policies:broken': KeyError: 'no licence'",
        ),
        ("leaving", "'leaving' cannot be loaded from 'their_policies:leaving': SystemExit: 0"),
        ("absent", "'absent' cannot be loaded from 'their_policies:Absent': AttributeError"),
        ("empty", "'empty', which is 'their_policies:Nothing', lacks name, prepare, choose"),
    ],
)
def test_what_is_no_policy_is_refused_by_name(name: str, message: str) -> None:
    with pytest.raises(PolicyError, match=f"policy {message}"):
        make_policy(name)
