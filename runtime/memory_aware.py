"""A policy for graphs without planned slots: keep few bytes in use.

Where a plan has given buffers their slots, the peak is fixed and this policy saves nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from slideformer.graph.graph import TaskGraph
from slideformer.graph.profile import MachineProfile
from slideformer.graph.tasks import Lane
from slideformer.runtime.runs import TaskRun


@dataclass(slots=True)
class _Instance:
    """Accesses to each loose buffer, and tasks, that are still to come."""

    accesses: Counter[str]
    tasks: int


@dataclass(slots=True)
class _Graph:
    """Loose buffers of each task, how often each is used, and the instances under way."""

    graph: TaskGraph
    buffers: list[list[str]]
    accesses: Counter[str]
    instances: dict[int, _Instance] = field(default_factory=dict)


class MemoryAware:
    """Prefers the task that frees most, or else takes least; greedy, lane by lane.

    A buffer without a slot that is not carried is in use from its first access to its last. Ties go
    to the older instance, then to the earlier task.
    """

    name = "memory-aware"

    def __init__(self) -> None:
        self._graphs: dict[int, _Graph] = {}

    def prepare(self, graph: TaskGraph, profile: MachineProfile) -> None:
        """Note which buffers each task uses and how often each is used."""
        loose = {b.name for b in graph.buffers.values() if not b.slot and not b.carried}
        buffers = [
            [n for n in dict.fromkeys((*t.reads, *t.writes)) if n in loose] for t in graph.tasks
        ]
        accesses = Counter(name for names in buffers for name in names)
        self._graphs[id(graph)] = _Graph(graph, buffers, accesses)

    def choose(self, lane: Lane, ready: Sequence[TaskRun]) -> TaskRun | None:
        """The task after which fewest bytes are in use."""
        run = min(ready, key=lambda r: (self._growth(r), r.instance.number, r.position))
        known = self._graphs[id(run.instance.graph)]
        instance = self._instance(run)
        for name in known.buffers[run.position]:
            instance.accesses[name] -= 1
        instance.tasks -= 1
        if instance.tasks == 0:
            del known.instances[run.instance.number]
        return run

    def _instance(self, run: TaskRun) -> _Instance:
        known, number = self._graphs[id(run.instance.graph)], run.instance.number
        if number not in known.instances:
            known.instances[number] = _Instance(known.accesses.copy(), len(known.graph.tasks))
        return known.instances[number]

    def _growth(self, run: TaskRun) -> int:
        """Bytes that the task takes, less those that no later task of its instance uses."""
        known = self._graphs[id(run.instance.graph)]
        names = known.buffers[run.position]
        if not names:
            return 0
        left, sizes = self._instance(run).accesses, known.graph.buffers
        growth = 0
        for name in names:
            if left[name] == known.accesses[name]:
                growth += sizes[name].nbytes
            if left[name] == 1:
                growth -= sizes[name].nbytes
        return growth
