"""Reads when an engine's tasks ran: how busy each lane was, why it waited, how fast it copied."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from slideformer.graph.tasks import Lane
from slideformer.simulation import GraphTimeline, Span

_LARGE_COPY = 4 << 20
"""Copies below this many bytes are dominated by what it takes to start them."""

_NOTED_GAP = 50e-6

Times = Sequence[tuple[float, float]]
"""Disjoint times in ascending order, each from a second to a second."""


@dataclass(frozen=True, slots=True)
class Gap:
    """Idle time of a lane: the task that ended it, and the tasks that it waited for, last first.

    All that the task itself waited for was done at ``ready``.
    """

    start: float
    stop: float
    task: str
    behind: tuple[str, ...]
    ready: float

    @property
    def seconds(self) -> float:
        """How long it was."""
        return self.stop - self.start

    @property
    def overhead(self) -> float:
        """Seconds of it in which the task could have run: deciding and launching take time."""
        return self.stop - max(self.start, self.ready)


def window(timeline: GraphTimeline, steps: int) -> tuple[float, float, int]:
    """Start and end of the last ``steps`` whole steps, or of as many as there are, and how many.

    A step reaches from its first computation to the next one's, so the timeline's last is left out.
    """
    starts: dict[int, float] = {}
    for span in timeline.of_lane(Lane.COMPUTE):
        starts.setdefault(span.instance, span.started)
    ordered = [starts[instance] for instance in sorted(starts)]
    whole = min(steps, len(ordered) - 1)
    return (ordered[-1 - whole], ordered[-1], whole) if whole > 0 else (0.0, 0.0, 0)


def covered(spans: Iterable[Span], start: float, stop: float) -> Times:
    """Times within ``[start, stop]`` in which at least one of the spans ran."""
    found: list[tuple[float, float]] = []
    for span in sorted(spans, key=lambda s: s.started):
        begin, end = max(span.started, start), min(span.stopped, stop)
        if begin >= end:
            continue
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((begin, end))
    return found


def gaps(timeline: GraphTimeline, lane: Lane, start: float, stop: float) -> list[Gap]:
    """Idle times of a lane in a window, the longest first."""
    found, reached = [], start
    for span in timeline.of_lane(lane):
        if span.stopped <= start or span.started >= stop:
            continue
        if span.started > reached:
            ready = max((s.stopped for s in timeline.waited_for(span)), default=start)
            behind = tuple(_behind(timeline, span))
            found.append(Gap(reached, span.started, span.task, behind, min(ready, span.started)))
        reached = max(reached, span.stopped)
    return sorted(found, key=lambda gap: -gap.seconds)


def _behind(timeline: GraphTimeline, span: Span) -> Iterator[str]:
    """The task that finished last of those a task waits for, then the one behind it, and so on.

    Names of tasks of an earlier step than the first end in an apostrophe.
    """
    instance = span.instance
    for _ in range(3):
        known = timeline.waited_for(span)
        if not known:
            return
        span = max(known, key=lambda each: each.stopped)
        yield span.task + "'" * (instance - span.instance)


def copy_speeds(timeline: GraphTimeline, start: float, stop: float) -> dict[str, float]:
    """Bytes per second of large copies: up and down alone, and both together while both run.

    A copy's bytes are spread evenly over its span. A direction that was never busy is missing.
    """
    nbytes = {task.name: task.cost.nbytes for task in timeline.graph.tasks}

    def within(spans: Iterable[Span], times: Times) -> float:
        return sum(
            _length(_overlap([(span.started, span.stopped)], times))
            * (nbytes[span.task] / max(span.seconds, 1e-9))
            for span in spans
        )

    large = {
        lane: [span for span in timeline.of_lane(lane) if nbytes[span.task] >= _LARGE_COPY]
        for lane in (Lane.H2D, Lane.D2H)
    }
    busy = {lane: covered(spans, start, stop) for lane, spans in large.items()}
    both = _overlap(busy[Lane.H2D], busy[Lane.D2H])
    result: dict[str, float] = {}
    for lane, spans in large.items():
        alone = _length(busy[lane]) - _length(both)
        if alone > 0:
            result[str(lane)] = (within(spans, busy[lane]) - within(spans, both)) / alone
    if both:
        result["both"] = sum(within(spans, both) for spans in large.values()) / _length(both)
    return result


def _overlap(a: Times, b: Times) -> Times:
    """Times in both."""
    found, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        begin, end = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if begin < end:
            found.append((begin, end))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return found


def _length(times: Times) -> float:
    return sum(end - begin for begin, end in times)


def report(timeline: GraphTimeline, steps: int, top: int = 10) -> list[str]:
    """Lines for reading: lanes, copies, kinds of tasks, and the longest waits of computation."""
    start, stop, steps = window(timeline, steps)
    length = stop - start
    if steps == 0:
        return ["trace: no whole step in it"]
    inside = [s for s in timeline.spans if s.started < stop and s.stopped > start]
    busy = {
        lane: _length(covered([s for s in inside if s.lane == lane], start, stop)) / length
        for lane in dict.fromkeys(span.lane for span in inside)
    }
    shares = ", ".join(f"{lane} {share:.1%}" for lane, share in sorted(busy.items()))
    lines = [f"trace: {length / steps:.3f} s a step over {steps}; busy: {shares}"]
    speeds = copy_speeds(timeline, start, stop)
    if speeds:
        text = ", ".join(f"{way} {rate / 1e9:.1f}" for way, rate in speeds.items())
        lines.append(f"  copies of 4 MiB and more, GB/s: {text}")
    verbs: dict[str, list[float]] = defaultdict(list)
    for span in inside:
        verbs[span.task.partition(".")[0]].append(span.seconds)
    heavy = sorted(verbs.items(), key=lambda item: -sum(item[1]))[:8]
    text = "; ".join(
        f"{verb} {len(each) / steps:.0f} × {median(each) * 1e3:.2f} = {sum(each) / steps * 1e3:.0f}"
        for verb, each in heavy
    )
    lines.append(f"  per step, ms: {text}")
    waits = gaps(timeline, Lane.COMPUTE, start, stop)
    idle: dict[tuple[str, str], float] = defaultdict(float)
    for gap in waits:
        behind = gap.behind[0].partition(".")[0] if gap.behind else "nothing known"
        idle[gap.task.partition(".")[0], behind] += gap.seconds
    text = "; ".join(
        f"{task} behind {behind} {seconds / steps * 1e3:.1f}"
        for (task, behind), seconds in sorted(idle.items(), key=lambda item: -item[1])[:5]
    )
    lines.append(f"  compute idle per step, ms: {text}")
    overhead = sum(gap.overhead for gap in waits)
    lines.append(
        f"  compute idle though a task could have run: {overhead / steps * 1e3:.1f} ms a step, "
        f"{overhead / length:.2%}"
    )
    lines += [
        f"  idle {gap.seconds * 1e3:6.2f} ms at {(gap.start - start) * 1e3:7.1f} ms: "
        + " <- ".join((gap.task, *gap.behind))
        for gap in waits[:top]
        if gap.seconds >= _NOTED_GAP
    ]
    return lines
