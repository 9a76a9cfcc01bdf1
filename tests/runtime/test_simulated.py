"""The simulated device: exact times on small graphs, and bounds that hold for all."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slideformer.graph.analysis import tails
from slideformer.graph.buffers import Tier
from slideformer.graph.builder import GraphBuilder
from slideformer.graph.errors import PolicyError
from slideformer.graph.graph import TaskGraph
from slideformer.graph.profile import MachineProfile
from slideformer.graph.tasks import STREAM_LANES, Cost, Lane, TaskKind
from slideformer.runtime.policies import Fifo, make_policy, policy_names
from slideformer.runtime.simulated import simulate
from slideformer.runtime.trace import Span
from tests.support.graphs import conflicts, step_like, task_graphs

PROFILE = MachineProfile()

widths = st.dictionaries(
    st.sampled_from([Lane.CPU, Lane.NVME_READ, Lane.NVME_WRITE]), st.integers(1, 3)
)
names = st.sampled_from(policy_names())


def times(spans: list[Span]) -> list[tuple[str, float, float]]:
    """Name, start and stop."""
    return [(span.task, span.started, span.stopped) for span in spans]


def test_copies_hide_behind_compute_but_for_the_first() -> None:
    builder = GraphBuilder()
    x = builder.buffer("x", 4, Tier.GPU)
    for i in range(3):
        host = builder.buffer(f"h{i}", 4, Tier.PINNED, carried=True)
        slot = builder.buffer(f"w{i}", 4, Tier.GPU)
        builder.task(f"h2d.L{i}", TaskKind.H2D, reads=[host], writes=[slot], cost=Cost(seconds=2.0))
        reads = [slot, x] if i else [slot]
        builder.task(f"fwd.L{i}", TaskKind.COMPUTE, reads=reads, writes=[x], cost=Cost(seconds=3.0))
    timeline = simulate(builder.build(), Fifo(), PROFILE)
    assert times(timeline.of_lane(Lane.H2D)) == [
        ("h2d.L0", 0.0, 2.0),
        ("h2d.L1", 2.0, 4.0),
        ("h2d.L2", 4.0, 6.0),
    ]
    assert times(timeline.of_lane(Lane.COMPUTE)) == [
        ("fwd.L0", 2.0, 5.0),
        ("fwd.L1", 5.0, 8.0),
        ("fwd.L2", 8.0, 11.0),
    ]
    assert timeline.makespan == 11.0


def test_a_host_task_starts_when_its_gpu_producer_has_finished() -> None:
    timeline = simulate(step_like(1, update=4.0), Fifo(), PROFILE)
    assert times(timeline.spans) == [
        ("h2d.L0", 0.0, 1.0),
        ("fwd.L0", 1.0, 2.0),
        ("bwd.L0", 2.0, 3.0),
        ("d2h.L0", 3.0, 4.0),
        ("update.L0", 4.0, 8.0),
    ]


def test_lanes_that_work_together_take_longer() -> None:
    builder = GraphBuilder()
    builder.task("up.x", TaskKind.H2D, cost=Cost(seconds=4.0))
    builder.task("down.x", TaskKind.D2H, cost=Cost(seconds=1.0))
    builder.task("update.x", TaskKind.CPU_UPDATE, cost=Cost(seconds=1.0))
    profile = MachineProfile(contention={Lane.H2D: 0.25, Lane.D2H: 0.25, Lane.CPU: 0.25})
    timeline = simulate(builder.build(), Fifo(), profile)
    # All three at a quarter of their speed until two are done at once, then the first one alone.
    assert sorted(times(timeline.spans)) == [
        ("down.x", 0.0, 4.0),
        ("up.x", 0.0, 7.0),
        ("update.x", 0.0, 4.0),
    ]


def test_a_wide_lane_runs_several_tasks_at_once() -> None:
    builder = GraphBuilder()
    for i in range(5):
        builder.task(f"t{i}.x", TaskKind.CPU, cost=Cost(seconds=1.0))
    graph = builder.build()
    assert simulate(graph, Fifo(), PROFILE).makespan == 5.0
    assert simulate(graph, Fifo(), MachineProfile(widths={Lane.CPU: 2})).makespan == 3.0
    assert simulate(graph, Fifo(), MachineProfile(widths={Lane.CPU: 9})).makespan == 1.0


@given(task_graphs(), names, widths, st.integers(1, 3))
def test_times_keep_every_order(
    graph: TaskGraph, name: str, wide: dict[Lane, int], instances: int
) -> None:
    profile = MachineProfile(widths=wide)
    timeline = simulate(graph, make_policy(name), profile, instances)
    by_key = {(span.instance, span.task): span for span in timeline.spans}
    spans = [by_key[i, task.name] for i in range(instances) for task in graph.tasks]
    assert len(timeline.spans) == len(spans)
    for earlier, later in conflicts([graph] * instances):
        assert spans[earlier].stopped <= spans[later].started
    for span, task in zip(spans, graph.tasks * instances, strict=True):
        assert span.seconds == pytest.approx(profile.seconds(task))
    for lane in Lane:
        width = 1 if lane in STREAM_LANES else wide.get(lane, 1)
        on_lane = [span for span in spans if span.lane is lane and span.seconds > 0]
        for instant in {span.started for span in on_lane}:
            assert sum(s.started <= instant < s.stopped for s in on_lane) <= width


@given(
    task_graphs(),
    names,
    st.dictionaries(st.sampled_from(Lane), st.floats(0.1, 1.0)),
    st.integers(1, 2),
)
def test_rivals_stretch_tasks_within_bounds_and_break_no_order(
    graph: TaskGraph, name: str, contention: dict[Lane, float], instances: int
) -> None:
    profile = MachineProfile(contention=contention)
    timeline = simulate(graph, make_policy(name), profile, instances)
    by_key = {(span.instance, span.task): span for span in timeline.spans}
    spans = [by_key[i, task.name] for i in range(instances) for task in graph.tasks]
    for earlier, later in conflicts([graph] * instances):
        assert spans[earlier].stopped <= spans[later].started
    for span, task in zip(spans, graph.tasks * instances, strict=True):
        alone = profile.seconds(task)
        slowest = alone / contention.get(task.lane, 1.0)
        assert alone * (1 - 1e-9) - 1e-9 <= span.seconds <= slowest * (1 + 1e-9) + 1e-9


@given(task_graphs(), names, widths)
def test_the_makespan_has_its_lower_bounds(
    graph: TaskGraph, name: str, wide: dict[Lane, int]
) -> None:
    profile = MachineProfile(widths=wide)
    timeline = simulate(graph, make_policy(name), profile)
    longest = max(tails(graph, profile), default=0.0)
    assert timeline.makespan >= longest - 1e-9
    for lane in Lane:
        work = sum(profile.seconds(task) for task in graph.tasks if task.lane is lane)
        width = 1 if lane in STREAM_LANES else wide.get(lane, 1)
        assert timeline.makespan >= work / width - 1e-9
    assert timeline.makespan <= sum(profile.seconds(task) for task in graph.tasks) + 1e-9


@settings(max_examples=30)
@given(task_graphs(), names)
def test_a_simulation_repeats_itself(graph: TaskGraph, name: str) -> None:
    first, second = (simulate(graph, make_policy(name), PROFILE, 2) for _ in range(2))
    assert first == second


def test_steps_overlap() -> None:
    """The next forward begins while layer 1 is being updated."""
    graph = step_like(3, update=2.0)
    timeline = simulate(graph, make_policy("earliest-deadline"), PROFILE, instances=2)
    assert timeline.instance(1).start < timeline.instance(0).stop
    assert timeline.makespan < 2 * timeline.instance(0).makespan


def test_an_hour_takes_no_time() -> None:
    started = time.perf_counter()
    assert simulate(step_like(2, update=3600.0), Fifo(), PROFILE).makespan > 7200
    assert time.perf_counter() - started < 5


def test_it_works_within_a_running_loop() -> None:
    """As in a notebook."""

    async def cell() -> float:
        return simulate(step_like(1), Fifo(), PROFILE).makespan

    assert asyncio.run(cell()) == simulate(step_like(1), Fifo(), PROFILE).makespan


def test_no_thread_is_left() -> None:
    before = threading.active_count()
    simulate(step_like(2), Fifo(), PROFILE)
    assert threading.active_count() == before


def test_nothing_takes_no_time() -> None:
    assert simulate(TaskGraph("empty", (), {}, {}), Fifo(), PROFILE, 2).makespan == 0.0


def test_a_broken_policy_ends_the_simulation() -> None:
    class Idle(Fifo):
        def choose(self, lane: object, ready: object) -> None:  # type: ignore[override]
            return None

    with pytest.raises(PolicyError, match="leaves every lane idle"):
        simulate(step_like(1), Idle(), PROFILE)
