"""Spans, timelines, and how much of them is kept."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slideformer.graph.graph import TaskGraph
from slideformer.graph.tasks import Lane, Task, TaskKind
from slideformer.runtime.runs import Finished, Instance, TaskRun
from slideformer.runtime.trace import Span, Timeline, Trace

TASK = Task("a.x", TaskKind.CPU, "a")
GRAPH = TaskGraph("g", (TASK,), {}, {})


def finished(number: int, started: float = 0.0, stopped: float = 1.0) -> Finished:
    """The task of instance ``number`` is done."""
    return Finished(TaskRun(Instance(number, GRAPH), 0, TASK, 0), started, stopped)


def timeline_of(*spans: tuple[int, int]) -> Timeline:
    """Spans of one lane, by start and stop."""
    return Timeline([Span(f"t{i}.x", 0, Lane.CPU, *times) for i, times in enumerate(spans)])


def test_measures_of_a_timeline() -> None:
    timeline = timeline_of((1, 3), (2, 5), (7, 8))
    timeline.spans.append(Span("copy.x", 1, Lane.H2D, 0.0, 4.0))
    assert (timeline.start, timeline.stop, timeline.makespan) == (0.0, 8, 8.0)
    assert timeline.busy(Lane.CPU) == 5, "overlapping spans count once"
    assert timeline.busy(Lane.D2H) == 0
    assert [span.task for span in timeline.of_lane(Lane.CPU)] == ["t0.x", "t1.x", "t2.x"]
    assert [span.task for span in timeline.instance(1).spans] == ["copy.x"]


def test_seconds_of_a_step() -> None:
    steps = Timeline([Span("a.x", i, Lane.CPU, 3.0 * i, 3.0 * i + 1) for i in range(3)])
    assert steps.step_seconds == 3.0
    assert steps.instance(1).step_seconds == 1.0
    # The lane never idles, but the first instance's last task was held up until the end.
    spans = [Span("a.x", i // 2, Lane.CPU, i, i + 1.0) for i in (1, 2, 3)]
    full = Timeline([*spans, Span("b.x", 0, Lane.CPU, 3.0, 4.0)])
    assert full.step_seconds == 1.5


def test_the_last_step_is_not_as_those_that_others_follow() -> None:
    stops = (2.0, 5.0, 8.0, 9.0)
    steps = Timeline([Span("a.x", i, Lane.CPU, stop - 1, stop) for i, stop in enumerate(stops)])
    assert steps.step_seconds == 3.0


def test_an_empty_timeline() -> None:
    timeline = Timeline()
    assert (timeline.makespan, timeline.busy(Lane.CPU)) == (0.0, 0.0)


spans = st.tuples(st.integers(0, 30), st.integers(0, 9)).map(lambda t: (t[0], t[0] + t[1]))


@given(st.lists(spans, max_size=8))
def test_busy_is_the_length_of_the_union(drawn: list[tuple[int, int]]) -> None:
    seconds = {second for start, stop in drawn for second in range(start, stop)}
    assert timeline_of(*drawn).busy(Lane.CPU) == len(seconds)


@given(st.lists(st.integers(0, 9), max_size=40), st.integers(1, 4))
def test_a_trace_keeps_the_last_instances(numbers: list[int], keep: int) -> None:
    """Whatever order their tasks end in: instances overlap."""
    trace = Trace(keep)
    for number in numbers:
        trace.record(finished(number))
    last = sorted(set(numbers))[-keep:]
    kept = [span.instance for span in trace.timeline().spans]
    assert set(kept) == set(last)
    newest = max(numbers, default=None)
    assert kept.count(newest) == numbers.count(newest), "of the newest nothing is lost"


def test_many_instances_of_one_graph_do_not_push_another_out() -> None:
    trace = Trace(keep=2)
    other = TaskGraph("h", (TASK,), {}, {})
    for number in range(9):
        graph = other if number < 3 else GRAPH
        run = TaskRun(Instance(number, graph), 0, TASK, 0)
        trace.record(Finished(run, 0.0, 1.0))
    assert [span.instance for span in trace.timeline().spans] == [1, 2, 7, 8]


def test_a_span_carries_what_happened() -> None:
    trace = Trace()
    trace.record(finished(3, 1.5, 4.0))
    (span,) = trace.timeline().spans
    assert span == Span("a.x", 3, Lane.CPU, 1.5, 4.0)
    assert span.seconds == pytest.approx(2.5)
