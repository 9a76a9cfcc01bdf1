"""`GraphBuilder`: the way to write down a graph, for training steps and for anything else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import TypeVar

from slideformer.graph.buffers import Buffer, Role, Slot, Tier
from slideformer.graph.errors import GraphError
from slideformer.graph.graph import TaskGraph
from slideformer.graph.tasks import Cost, Task, TaskKind
from slideformer.graph.verify import verify

CHUNK_ALIGNMENT = 256
"""Bytes to whose multiples chunks begin, as copies and kernels like it."""

_Item = TypeVar("_Item", Task, Buffer, Slot)
_Member = TypeVar("_Member", bound=StrEnum)


class GraphBuilder:
    """Collects slots, buffers and tasks in program order; `build` verifies and freezes them.

    >>> b = GraphBuilder("double")
    >>> x = b.buffer("x", 4, Tier.CPU, carried=True)
    >>> b.task("double.x", TaskKind.CPU, reads=[x], writes=[x])
    'double.x'
    >>> len(b.build().tasks)
    1
    """

    def __init__(self, name: str = "graph") -> None:
        self._name = name
        self._tasks: dict[str, Task] = {}
        self._buffers: dict[str, Buffer] = {}
        self._slots: dict[str, Slot] = {}

    def slot(self, name: str, tier: Tier, nbytes: int) -> str:
        """Declare a slot of ``nbytes`` bytes; returns its name."""
        slot = Slot(name, _member(Tier, tier, f"slot {name}"), nbytes)
        self._slots[name] = self._new(self._slots, slot)
        return name

    def buffer(
        self,
        name: str,
        nbytes: int,
        tier: Tier,
        *,
        role: Role = Role.OTHER,
        slot: str = "",
        offset: int = 0,
        carried: bool = False,
    ) -> str:
        """Declare a buffer of ``nbytes`` bytes; returns its name."""
        where = f"buffer {name}"
        tier, role = _member(Tier, tier, where), _member(Role, role, where)
        buffer = Buffer(name, nbytes, tier, role, slot, offset, carried)
        self._buffers[name] = self._new(self._buffers, buffer)
        return name

    def chunks(
        self,
        name: str,
        nbytes: int,
        most: int,
        tier: Tier,
        *,
        role: Role = Role.OTHER,
        slot: str = "",
        offset: int = 0,
        carried: bool = False,
    ) -> list[str]:
        """Declare ``nbytes`` bytes as nearly equal buffers of at most ``most``; returns the names.

        They are called NAME.c0, NAME.c1, … and begin at multiples of 256 bytes; in a slot they lie
        one after another from ``offset`` on. Tasks on different chunks need not wait for each
        other. Raises `GraphError` if ``most`` is less than 256.
        """
        if most < CHUNK_ALIGNMENT:
            raise GraphError(f"chunks of {name} are of at most {most} bytes; give 256 or more")
        most -= most % CHUNK_ALIGNMENT
        pieces = max(1, -(-nbytes // most))
        step = max(1, -(-nbytes // (pieces * CHUNK_ALIGNMENT))) * CHUNK_ALIGNMENT
        return [
            self.buffer(
                f"{name}.c{number}",
                min(step, nbytes - begin),
                tier,
                role=role,
                slot=slot,
                offset=offset + begin if slot else 0,
                carried=carried,
            )
            for number, begin in enumerate(range(0, max(nbytes, 1), step))
        ]

    def task(
        self,
        name: str,
        kind: TaskKind,
        *,
        op: str = "",
        reads: Sequence[str] = (),
        writes: Sequence[str] = (),
        after: Sequence[str] = (),
        cost: Cost | None = None,
        **args: int | str,
    ) -> str:
        """Append a task; ``op`` defaults to the name's first part. Returns the task's name."""
        op = op or name.split(".", 1)[0]
        kind = _member(TaskKind, kind, f"task {name}")
        for what, names in (("reads", reads), ("writes", writes), ("after", after)):
            if isinstance(names, str):  # which is a sequence of names, too, one for each letter
                raise GraphError(f"task {name}: {what} is the text {names!r}, not a list of names")
        task = Task(name, kind, op, tuple(reads), tuple(writes), tuple(after), cost or Cost(), args)
        self._tasks[name] = self._new(self._tasks, task)
        return name

    def build(self) -> TaskGraph:
        """The finished graph; raises `GraphError` naming every broken rule."""
        graph = self.unchecked()
        verify(graph)
        return graph

    def unchecked(self) -> TaskGraph:
        """The same graph for who will not run it: no rule is checked."""
        return TaskGraph(
            self._name, tuple(self._tasks.values()), dict(self._buffers), dict(self._slots)
        )

    @staticmethod
    def _new(known: Mapping[str, _Item], item: _Item) -> _Item:
        if item.name in known:
            raise GraphError(f"{type(item).__name__.lower()} {item.name!r} is declared twice")
        return item


def _member(choices: type[_Member], value: _Member, where: str) -> _Member:
    """``value`` as one of ``choices``, if it is one or is spelt like one."""
    try:
        return choices(value)
    except ValueError:
        known = ", ".join(choices)
        raise GraphError(
            f"{where}: {choices.__name__} {value!r} does not exist; known: {known}"
        ) from None
