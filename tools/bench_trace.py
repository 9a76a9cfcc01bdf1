"""Reads a trace of the engine: how busy each lane was, what it waited for, how fast it copied.

Works on plain data, which a worker process sends: ``spans`` (task, instance, lane, start, stop;
seconds) and ``tasks`` (name → lane, bytes, FLOPs, the tasks it comes after in its step and in the
step before).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from slideformer.graph.tasks import Lane

_LARGE_COPY = 4 << 20
"""Copies below this many bytes are dominated by what it takes to start them."""

_NOTED_GAP = 50e-6


@dataclass(frozen=True, slots=True)
class Span:
    """One task's time."""

    task: str
    instance: int
    lane: str
    start: float
    stop: float


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


def spans_of(trace: Mapping[str, Any]) -> list[Span]:
    """The spans of a trace in order of their start."""
    return sorted((Span(*each) for each in trace["spans"]), key=lambda span: span.start)


def window(spans: Sequence[Span], steps: int) -> tuple[float, float, int]:
    """Start and end of the last ``steps`` whole steps, or of as many as there are, and how many.

    A step reaches from its first computation to the next one's, so the trace's last is left out.
    """
    starts: dict[int, float] = {}
    for span in spans:
        if span.lane == Lane.COMPUTE:
            starts[span.instance] = min(span.start, starts.get(span.instance, span.start))
    ordered = [starts[instance] for instance in sorted(starts)]
    whole = min(steps, len(ordered) - 1)
    return (ordered[-1 - whole], ordered[-1], whole) if whole > 0 else (0.0, 0.0, 0)


def covered(spans: Sequence[Span], start: float, stop: float) -> list[tuple[float, float]]:
    """Disjoint times within ``[start, stop]`` in which at least one of the spans ran."""
    found: list[tuple[float, float]] = []
    for span in sorted(spans, key=lambda s: s.start):
        begin, end = max(span.start, start), min(span.stop, stop)
        if begin >= end:
            continue
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((begin, end))
    return found


def gaps(trace: Mapping[str, Any], lane: str, start: float, stop: float) -> list[Gap]:
    """Idle times of a lane in a window, the longest first."""
    spans = spans_of(trace)
    at = {(span.task, span.instance): span for span in spans}
    found, reached = [], start
    for span in spans:
        if span.lane != lane or span.stop <= start or span.start >= stop:
            continue
        if span.start > reached:
            behind = tuple(_chain(span, at, trace["tasks"]))
            ready = max((s.stop for s in _waited_for(span, at, trace["tasks"])), default=start)
            found.append(Gap(reached, span.start, span.task, behind, min(ready, span.start)))
        reached = max(reached, span.stop)
    return sorted(found, key=lambda gap: -gap.seconds)


def _chain(
    span: Span, at: Mapping[tuple[str, int], Span], tasks: Mapping[str, Any], length: int = 3
) -> Iterator[str]:
    """The task that finished last of those a task waits for, then the one behind it, and so on.

    Names of tasks of an earlier step than the first end in an apostrophe.
    """
    instance = span.instance
    for _ in range(length):
        known = _waited_for(span, at, tasks)
        if not known:
            return
        span = max(known, key=lambda each: each.stop)
        yield span.task + "'" * (instance - span.instance)


def _waited_for(
    span: Span, at: Mapping[tuple[str, int], Span], tasks: Mapping[str, Any]
) -> list[Span]:
    """The tasks that a task waits for, in its own step and the one before."""
    task = tasks.get(span.task, {})
    wanted = [(name, span.instance) for name in task.get("after", ())]
    wanted += [(name, span.instance - 1) for name in task.get("after_previous", ())]
    return [at[key] for key in wanted if key in at]


def copy_speeds(trace: Mapping[str, Any], start: float, stop: float) -> dict[str, float]:
    """Bytes per second of large copies: up and down alone, and both together while both run.

    A copy's bytes are spread evenly over its span. A direction that was never busy is missing.
    """
    lanes = {}
    for lane in (Lane.H2D, Lane.D2H):
        large = [
            span
            for span in spans_of(trace)
            if span.lane == lane
            and trace["tasks"].get(span.task, {}).get("nbytes", 0) >= _LARGE_COPY
        ]
        lanes[lane] = large, covered(large, start, stop)
    both = _overlap(lanes[Lane.H2D][1], lanes[Lane.D2H][1])
    result: dict[str, float] = {}
    together = 0.0
    for lane, (spans, busy) in lanes.items():
        total = sum(_bytes_within(trace, span, busy) for span in spans)
        shared = sum(_bytes_within(trace, span, both) for span in spans)
        alone = _length(busy) - _length(both)
        together += shared
        if alone > 0:
            result[str(lane)] = (total - shared) / alone
    if both:
        result["both"] = together / _length(both)
    return result


def _bytes_within(
    trace: Mapping[str, Any], span: Span, times: Sequence[tuple[float, float]]
) -> float:
    inside = _length(_overlap([(span.start, span.stop)], times))
    rate = trace["tasks"][span.task]["nbytes"] / max(span.stop - span.start, 1e-9)
    return float(inside * rate)


def _overlap(
    a: Sequence[tuple[float, float]], b: Sequence[tuple[float, float]]
) -> list[tuple[float, float]]:
    """Times in both of two ascending lists of disjoint times."""
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


def _length(times: Sequence[tuple[float, float]]) -> float:
    return sum(end - begin for begin, end in times)


def report(trace: Mapping[str, Any], steps: int, top: int = 10) -> list[str]:
    """Lines for reading: lanes, copies, kinds of tasks, and the longest waits of computation."""
    spans = spans_of(trace)
    start, stop, steps = window(spans, steps)
    length = stop - start
    if steps == 0:
        return ["trace: no whole step in it"]
    inside = [span for span in spans if span.start < stop and span.stop > start]
    busy = {
        lane: _length(covered([s for s in inside if s.lane == lane], start, stop)) / length
        for lane in dict.fromkeys(span.lane for span in inside)
    }
    shares = ", ".join(f"{lane} {share:.1%}" for lane, share in sorted(busy.items()))
    lines = [f"trace: {length / steps:.3f} s a step over {steps}; busy: {shares}"]
    speeds = copy_speeds(trace, start, stop)
    if speeds:
        text = ", ".join(f"{way} {rate / 1e9:.1f}" for way, rate in speeds.items())
        lines.append(f"  copies of 4 MiB and more, GB/s: {text}")
    verbs: dict[str, list[float]] = defaultdict(list)
    for span in inside:
        verbs[span.task.partition(".")[0]].append(span.stop - span.start)
    heavy = sorted(verbs.items(), key=lambda item: -sum(item[1]))[:8]
    text = "; ".join(
        f"{verb} {len(each) / steps:.0f} × {median(each) * 1e3:.2f} = {sum(each) / steps * 1e3:.0f}"
        for verb, each in heavy
    )
    lines.append(f"  per step, ms: {text}")
    waits = gaps(trace, Lane.COMPUTE, start, stop)
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
