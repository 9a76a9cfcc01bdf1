"""The task graph: tasks in program order, buffers, slots, and the edges that follow from them.

A graph is plain data and never changes. Edges are not stored but derived on first use, so a graph
read from a file cannot disagree with its own buffers. Rules that a graph must keep are checked in
``verify.py``; graphs are made with ``builder.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from slideformer.graph.buffers import Buffer, Slot, Tier
from slideformer.graph.errors import GraphError
from slideformer.graph.hazards import HazardMap, read_segment, write_segment
from slideformer.graph.tasks import Task


class Entry(NamedTuple):
    """A task's access to bytes that no earlier task of its graph has written.

    What it waits for, if anything, is an earlier instance.
    """

    task: int
    place: str
    start: int
    stop: int
    write: bool


class Exit(NamedTuple):
    """Bytes as a graph leaves them: last writer (None: only read) and the readers after it."""

    place: str
    start: int
    stop: int
    writer: int | None
    readers: tuple[int, ...]


class Edges(NamedTuple):
    """What `TaskGraph.edges` derives; tasks are indices into `TaskGraph.tasks`."""

    predecessors: tuple[tuple[int, ...], ...]
    successors: tuple[tuple[int, ...], ...]
    entries: tuple[Entry, ...]
    exits: tuple[Exit, ...]


class Direct(NamedTuple):
    """What `TaskGraph.direct` derives: how many predecessors each task has, and its successors."""

    predecessors: tuple[int, ...]
    successors: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class TaskGraph:
    """Tasks in program order with the buffers and slots they use."""

    name: str
    tasks: tuple[Task, ...]
    buffers: Mapping[str, Buffer]
    slots: Mapping[str, Slot]

    @cached_property
    def index(self) -> Mapping[str, int]:
        """Task name → position in `tasks`."""
        return {task.name: position for position, task in enumerate(self.tasks)}

    @cached_property
    def places(self) -> Mapping[str, tuple[Tier, int]]:
        """Tier and bytes of every slot, and of every buffer without one."""
        own = {b.name: (b.tier, b.nbytes) for b in self.buffers.values() if not b.slot}
        return own | {slot.name: (slot.tier, slot.nbytes) for slot in self.slots.values()}

    @cached_property
    def edges(self) -> Edges:
        """Dependencies derived from buffers, slots and ``after``; redundant edges are kept.

        Raises `GraphError` if a task names an unknown buffer or an unknown task.
        """
        hazards: HazardMap[int] = HazardMap()
        waits: list[set[int]] = [set() for _ in self.tasks]
        entries: list[Entry] = []
        for position, (task, before) in enumerate(zip(self.tasks, waits, strict=True)):
            for names, write in ((task.reads, False), (task.writes, True)):
                for name in names:
                    buffer = self._buffer(task, name)
                    place = buffer.place
                    for segment in hazards.cut(place, buffer.offset, buffer.stop):
                        if segment.writer is None:
                            entries.append(
                                Entry(position, place, segment.start, segment.stop, write)
                            )
                        if write:
                            before.update(write_segment(segment, position, name))
                        else:
                            before.update(read_segment(segment, position))
            before.discard(position)
            if task.after:
                before.update(self._after(task))
        successors: list[list[int]] = [[] for _ in self.tasks]
        for position, preds in enumerate(waits):
            for pred in preds:
                successors[pred].append(position)
        exits = tuple(
            Exit(place, s.start, s.stop, s.writer, tuple(dict.fromkeys(s.readers)))
            for place, s in hazards.segments()
        )
        return Edges(
            tuple(tuple(sorted(preds)) for preds in waits),
            tuple(tuple(s) for s in successors),
            tuple(entries),
            exits,
        )

    @cached_property
    def direct(self) -> Direct:
        """The edges without those that two others imply, of which most graphs have more.

        Whoever has waited for ``b`` in ``a → b → c`` has waited for ``a``.
        """
        predecessors = self.edges.predecessors
        before = [frozenset(preds) for preds in predecessors]
        counts: list[int] = []
        successors: list[list[int]] = [[] for _ in self.tasks]
        for position, preds in enumerate(predecessors):
            implied = frozenset[int]().union(*(before[pred] for pred in preds))
            left = [pred for pred in preds if pred not in implied]
            counts.append(len(left))
            for pred in left:
                successors[pred].append(position)
        return Direct(tuple(counts), tuple(tuple(s) for s in successors))

    @cached_property
    def in_order(self) -> bool:
        """Whether every edge leads onward in program order; only an ``after`` can lead back."""
        return all(
            not preds or preds[-1] < position
            for position, preds in enumerate(self.edges.predecessors)
        )

    def _buffer(self, task: Task, name: str) -> Buffer:
        try:
            return self.buffers[name]
        except KeyError:
            raise GraphError(f"task {task.name} uses unknown buffer {name!r}") from None

    def _after(self, task: Task) -> list[int]:
        try:
            return [self.index[name] for name in task.after]
        except KeyError as missing:
            raise GraphError(f"task {task.name} runs after unknown task {missing}") from None
