"""A policy for graphs without planned slots: keep few bytes in use.

Where a plan has given buffers their slots, the peak is fixed and this policy saves nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from slideformer.graph.graph import TaskGraph
from slideformer.graph.profile import MachineProfile
from slideformer.graph.tasks import Lane
from slideformer.runtime.ranks import Ranks
from slideformer.runtime.runs import TaskRun


@dataclass(slots=True)
class _Graph:
    """Loose buffers of each task, the tasks that use each, and the instances under way."""

    graph: TaskGraph
    buffers: list[list[str]]
    users: dict[str, list[int]]
    instances: dict[int, _Instance] = field(default_factory=dict)


@dataclass(slots=True)
class _Instance:
    """Accesses to each loose buffer, and tasks, that are still to come."""

    accesses: dict[str, int]
    tasks: int


class MemoryAware:
    """Prefers the task that frees most, or else takes least; greedy, lane by lane.

    A buffer without a slot that is not carried is in use from its first access to its last. Ties go
    to the older instance, then to the earlier task.
    """

    name = "memory-aware"

    def __init__(self) -> None:
        self._graphs: dict[int, _Graph] = {}
        self._ranks = Ranks(self._rank)

    def prepare(self, graph: TaskGraph, profile: MachineProfile) -> None:
        """Note which buffers each task uses, and which tasks use each."""
        loose = {b.name for b in graph.buffers.values() if not b.slot and not b.carried}
        buffers = [
            [n for n in dict.fromkeys((*t.reads, *t.writes)) if n in loose] for t in graph.tasks
        ]
        users: dict[str, list[int]] = {}
        for position, names in enumerate(buffers):
            for name in names:
                users.setdefault(name, []).append(position)
        self._graphs[id(graph)] = _Graph(graph, buffers, users)

    def choose(self, lane: Lane, ready: Sequence[TaskRun]) -> TaskRun | None:
        """The task after which fewest bytes are in use."""
        run = self._ranks.take(ready)
        known, instance = self._known(run)
        for name in known.buffers[run.position]:
            left, users = instance.accesses[name], known.users[name]
            instance.accesses[name] = left - 1
            if left == len(users) or left == 2:  # others no longer take it, or the last frees it
                for position in users:
                    self._ranks.pop(run.instance.runs[position], None)
        instance.tasks -= 1
        if instance.tasks == 0:
            del known.instances[run.instance.number]
        return run

    def _known(self, run: TaskRun) -> tuple[_Graph, _Instance]:
        known, number = self._graphs[id(run.instance.graph)], run.instance.number
        if number not in known.instances:
            accesses = {name: len(users) for name, users in known.users.items()}
            known.instances[number] = _Instance(accesses, len(known.graph.tasks))
        return known, known.instances[number]

    def _rank(self, run: TaskRun) -> tuple[int, int, int]:
        """First the bytes that the task takes, less those that no later task uses; then its age."""
        known, instance = self._known(run)
        growth = 0
        for name in known.buffers[run.position]:
            left, nbytes = instance.accesses[name], known.graph.buffers[name].nbytes
            if left == len(known.users[name]):
                growth += nbytes
            if left == 1:
                growth -= nbytes
        return growth, run.instance.number, run.position
