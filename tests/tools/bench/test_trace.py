"""What the benchmark reads from timelines, on one written down by hand."""

from __future__ import annotations

import pytest

from slideformer.graph.buffers import Tier
from slideformer.graph.builder import GraphBuilder
from slideformer.graph.tasks import Cost, Lane, TaskKind
from slideformer.simulation import GraphTimeline, Span
from slideformer.tools.bench import trace

MIB = 1 << 20


def traced() -> GraphTimeline:
    """Three steps; a copy up waits for the update of the step before."""
    b = GraphBuilder("step")
    hi = b.buffer("hi", 20 * MIB, Tier.PINNED, carried=True)
    w = b.buffer("w", 20 * MIB, Tier.GPU)
    state = b.buffer("state", 8 * MIB, Tier.GPU, carried=True)
    down = b.buffer("down", 8 * MIB, Tier.PINNED)
    b.task("h2d.A", TaskKind.H2D, reads=[hi], writes=[w], cost=Cost(nbytes=20 * MIB))
    b.task("fwd.A", TaskKind.COMPUTE, reads=[w])
    b.task("fwd.B", TaskKind.COMPUTE, after=["fwd.A"])
    after, cost = ["fwd.A"], Cost(nbytes=8 * MIB)
    b.task("d2h.A", TaskKind.D2H, reads=[state], writes=[down], after=after, cost=cost)
    b.task("update.A", TaskKind.CPU_UPDATE, writes=[hi])
    spans = [
        Span("update.A", 0, Lane.CPU, 0.0, 1.5),
        Span("fwd.A", 0, Lane.COMPUTE, 0.0, 1.0),
        Span("h2d.A", 1, Lane.H2D, 1.5, 3.5),
        Span("d2h.A", 0, Lane.D2H, 2.5, 4.5),
        Span("fwd.A", 1, Lane.COMPUTE, 3.5, 4.0),
        Span("fwd.B", 1, Lane.COMPUTE, 4.25, 5.0),
        Span("fwd.A", 2, Lane.COMPUTE, 5.0, 6.0),
    ]
    return GraphTimeline(spans, graph=b.build())


def test_gaps_name_what_was_waited_for() -> None:
    timeline = traced()
    start, stop, steps = trace.window(timeline, 2)
    assert (start, stop, steps) == (0.0, 5.0, 2)
    first, second = trace.gaps(timeline, Lane.COMPUTE, start, stop)
    assert (first.start, first.stop, first.task) == (1.0, 3.5, "fwd.A")
    assert first.behind == ("h2d.A", "update.A'")
    assert (second.seconds, second.behind[0]) == (0.25, "fwd.A")
    assert (first.overhead, second.overhead) == (0.0, 0.25)
    said = "could have run: 125.0 ms a step, 5.00%"
    assert any(said in line for line in trace.report(timeline, 2))


def test_a_window_is_no_longer_than_the_trace() -> None:
    timeline = traced()
    assert trace.window(timeline, 1) == (3.5, 5.0, 1)
    assert trace.window(timeline, 9) == (0.0, 5.0, 2)
    nothing = GraphTimeline([], graph=timeline.graph)
    assert trace.report(nothing, 3) == ["trace: no whole step in it"]


def test_copies_alone_and_together() -> None:
    speeds = trace.copy_speeds(traced(), 0.0, 5.0)
    assert speeds == pytest.approx({"h2d": 10 * MIB, "d2h": 4 * MIB, "both": 14 * MIB})


def test_overlapping_spans_are_covered_once() -> None:
    spans = [Span("a", 0, Lane.CPU, *at) for at in ((0, 2), (1, 3), (5, 6))]
    assert trace.covered(spans, 0.5, 5.5) == [(0.5, 3), (5, 5.5)]
