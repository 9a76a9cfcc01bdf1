"""Who must wait for whom: dependencies derived from the bytes that tasks touch.

Two accesses conflict if their byte ranges overlap and at least one of them writes. A `HazardMap`
remembers, for each range of each place (a slot, or a buffer of its own), the last writer and the
readers since. Fed in program order it yields read-after-write, write-after-read, write-after-write
and slot-reuse edges alike. The same map, kept across instances of graphs, orders one step after
another without a barrier.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Generic, TypeVar

T = TypeVar("T")

_start = attrgetter("start")
_stop = attrgetter("stop")


@dataclass(slots=True, eq=False)
class Segment(Generic[T]):
    """Bytes ``[start, stop)`` of a place with one access history.

    ``writer`` is the last task that wrote them (None: not written here yet), ``readers`` the tasks
    that read them since, ``owner`` the buffer whose contents they hold.
    """

    start: int
    stop: int
    writer: T | None
    readers: list[T]
    owner: str | None

    def _part(self, start: int, stop: int) -> Segment[T]:
        return Segment(start, stop, self.writer, list(self.readers), self.owner)


class HazardMap(Generic[T]):
    """Last writer and readers of every byte touched so far, per place."""

    def __init__(self) -> None:
        self._places: dict[str, list[Segment[T]]] = {}
        self._known: dict[str, dict[tuple[int, int], list[Segment[T]]]] = {}
        """What was asked for of each place since its segments last changed: most of it again."""

    def cut(self, place: str, start: int, stop: int) -> list[Segment[T]]:
        """The segments that exactly tile ``[start, stop)``, split and created as needed."""
        known = self._known.setdefault(place, {})
        found = known.get((start, stop))
        if found is None:
            found, changed = self._cut(place, start, stop)
            if changed:
                known.clear()
            known[start, stop] = found
        return found

    def _cut(self, place: str, start: int, stop: int) -> tuple[list[Segment[T]], bool]:
        """The same, and whether the place has other segments now."""
        segments = self._places.get(place)
        if segments is None:
            fresh: Segment[T] = Segment(start, stop, None, [], None)
            self._places[place] = [fresh]
            return [fresh], True
        first = bisect_right(segments, start, key=_stop)
        last = bisect_left(segments, stop, lo=first, key=_start)
        before: list[Segment[T]] = []
        inside: list[Segment[T]] = []
        after: list[Segment[T]] = []
        cursor = start
        for segment in segments[first:last]:
            if segment.start > cursor:
                inside.append(Segment(cursor, segment.start, None, [], None))
            low, high = max(segment.start, start), min(segment.stop, stop)
            if segment.start < low:
                before.append(segment._part(segment.start, low))
            if segment.stop > high:
                after.append(segment._part(high, segment.stop))
            if segment.start == low and segment.stop == high:
                inside.append(segment)
            else:
                inside.append(segment._part(low, high))
            cursor = high
        if cursor < stop:
            inside.append(Segment(cursor, stop, None, [], None))
        changed = inside != segments[first:last]
        segments[first:last] = [*before, *inside, *after]
        return inside, changed

    def segments(self) -> Iterator[tuple[str, Segment[T]]]:
        """Every segment with the name of its place."""
        for place, segments in self._places.items():
            for segment in segments:
                yield place, segment


def read_segment(segment: Segment[T], task: T) -> list[T]:
    """Record a read; returns the tasks it must wait for (at most the writer)."""
    segment.readers.append(task)
    return [] if segment.writer is None else [segment.writer]


def write_segment(segment: Segment[T], task: T, owner: str | None) -> list[T]:
    """Record a write; returns the tasks it must wait for (the readers, and the writer if none)."""
    waits = [reader for reader in segment.readers if reader != task]
    if segment.writer is not None:
        waits.append(segment.writer)
    segment.writer, segment.readers, segment.owner = task, [], owner
    return waits
