"""What changed from one graph to another: slots, buffers and tasks by name, and their order.

Compares what is written down, not what follows from it: edges are not listed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from slideformer.graph.buffers import Buffer, Slot
from slideformer.graph.graph import TaskGraph
from slideformer.graph.tasks import Task

Change = Literal["added", "removed", "changed", "moved"]


@dataclass(frozen=True, slots=True)
class Difference:
    """One slot, buffer or task (``what``) that differs; ``details`` says how, if it changed."""

    change: Change
    what: Literal["slot", "buffer", "task"]
    name: str
    details: str = ""

    def __str__(self) -> str:
        return f"{self.change} {self.what} {self.name}" + (
            f": {self.details}" if self.details else ""
        )


def diff(old: TaskGraph, new: TaskGraph) -> list[Difference]:
    """Every difference from ``old`` to ``new``; empty exactly if all but their names is equal.

    A task has ``moved`` if it is in both graphs, but stands behind another task of both graphs than
    it did before, so that the program order that edges follow is another.
    """
    return [
        *_compare("slot", old.slots, new.slots),
        *_compare("buffer", old.buffers, new.buffers),
        *_compare("task", {t.name: t for t in old.tasks}, {t.name: t for t in new.tasks}),
        *_moved(old, new),
    ]


def _compare(
    what: Literal["slot", "buffer", "task"],
    old: Mapping[str, Slot] | Mapping[str, Buffer] | Mapping[str, Task],
    new: Mapping[str, Slot] | Mapping[str, Buffer] | Mapping[str, Task],
) -> Iterator[Difference]:
    for name in old:
        if name not in new:
            yield Difference("removed", what, name)
        elif old[name] != new[name]:
            yield Difference("changed", what, name, _details(old[name], new[name]))
    for name in new:
        if name not in old:
            yield Difference("added", what, name)


def _details(old: Slot | Buffer | Task, new: Slot | Buffer | Task) -> str:
    parts = []
    for field in old.__dataclass_fields__:
        before, after = getattr(old, field), getattr(new, field)
        if before == after:
            continue
        if isinstance(before, tuple):
            gone = [f"-{name}" for name in before if name not in after]
            come = [f"+{name}" for name in after if name not in before]
            parts.append(f"{field} {' '.join(gone + come) or 'in another order'}")
        else:
            parts.append(f"{field} {before} → {after}")
    return "; ".join(parts)


def _moved(old: TaskGraph, new: TaskGraph) -> Iterator[Difference]:
    before = [t.name for t in old.tasks if t.name in new.index]
    after = [t.name for t in new.tasks if t.name in old.index]
    previous = dict(zip(before[1:], before, strict=False))
    for earlier, name in zip([None, *after], after, strict=False):
        if previous.get(name) != earlier:
            place = f"now behind {earlier}" if earlier else "now first"
            yield Difference("moved", "task", name, place)
