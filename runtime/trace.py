"""What ran when: spans with their tasks' names, predicted and measured alike."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from operator import attrgetter
from typing import NamedTuple

from slideformer.graph.graph import TaskGraph
from slideformer.graph.tasks import Lane
from slideformer.runtime.runs import Finished


class Span(NamedTuple):
    """One task's time on its lane, in seconds on the device's clock."""

    task: str
    instance: int
    lane: Lane
    started: float
    stopped: float

    @property
    def seconds(self) -> float:
        """Its duration."""
        return self.stopped - self.started


_started = attrgetter("started")


@dataclass(slots=True)
class Timeline:
    """Spans in the order in which they finished."""

    spans: list[Span] = field(default_factory=list)

    @property
    def start(self) -> float:
        """When the first task started."""
        return min((s.started for s in self.spans), default=0.0)

    @property
    def stop(self) -> float:
        """When the last task finished."""
        return max((s.stopped for s in self.spans), default=0.0)

    @property
    def makespan(self) -> float:
        """Seconds from the first start to the last finish."""
        return self.stop - self.start

    @property
    def step_seconds(self) -> float:
        """Seconds of a step while steps follow each other; of a single instance, its makespan.

        From the end of one instance to the end of the next, but at least what any lane works per
        instance. Of three or more, the last does not count: no step follows whose tasks share the
        lanes with it.
        """
        ends: dict[int, float] = {}
        lanes: dict[Lane, list[Span]] = {}
        for span in self.spans:
            if span.stopped >= ends.get(span.instance, span.stopped):
                ends[span.instance] = span.stopped
            lanes.setdefault(span.lane, []).append(span)
        if len(ends) < 2:
            return self.makespan
        first, *others = [ends[number] for number in sorted(ends)]
        counted = others[:-1] or others
        between = (counted[-1] - first) / len(counted)
        return max(between, *(_busy(spans) / len(ends) for spans in lanes.values()))

    def of_lane(self, lane: Lane) -> list[Span]:
        """The spans of one lane in order of their start."""
        return sorted((s for s in self.spans if s.lane is lane), key=_started)

    def busy(self, lane: Lane) -> float:
        """Seconds in which at least one task of the lane ran."""
        return _busy([span for span in self.spans if span.lane is lane])

    def instance(self, number: int) -> Timeline:
        """The spans of one instance."""
        return Timeline([s for s in self.spans if s.instance == number])


def _busy(spans: Iterable[Span]) -> float:
    """Seconds in which at least one of them ran."""
    total, reached = 0.0, float("-inf")
    for span in sorted(spans, key=_started):
        if span.stopped > reached:
            total += span.stopped - max(span.started, reached)
            reached = span.stopped
    return total


class Trace:
    """Collects spans as tasks finish; keeps those of the last ``keep`` instances of each graph."""

    def __init__(self, keep: int = 8) -> None:
        self._keep = keep
        self._spans: dict[int, list[Span]] = {}
        self._graphs: dict[int, TaskGraph] = {}

    def record(self, event: Finished) -> None:
        """Take note of a finished task."""
        run = event.run
        number, graph = run.instance.number, run.instance.graph
        if number not in self._spans:
            self._spans[number], self._graphs[number] = [], graph
            alike = [other for other, of in self._graphs.items() if of is graph]
            for old in sorted(alike)[: -self._keep]:
                del self._spans[old], self._graphs[old]
        if number in self._spans:  # else it is older than all that are kept
            span = Span(run.task.name, number, run.task.lane, event.started, event.stopped)
            self._spans[number].append(span)

    def timeline(self) -> Timeline:
        """All spans kept; may be called from any thread while others record."""
        return Timeline([span for spans in list(self._spans.values()) for span in spans])
