"""Numbers about a graph: tasks and work by kind, load by lane, bytes by tier, critical path."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from slideformer.graph.analysis import critical_path
from slideformer.graph.buffers import Tier
from slideformer.graph.graph import TaskGraph
from slideformer.graph.profile import MachineProfile
from slideformer.graph.tasks import Lane, Task, TaskKind

_Key = TypeVar("_Key", TaskKind, Lane)


@dataclass(frozen=True, slots=True)
class Load:
    """Work of some tasks: bytes moved or touched, FLOPs, updated parameters, predicted seconds."""

    tasks: int = 0
    nbytes: int = 0
    flops: int = 0
    params: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class GraphStats:
    """What `graph_stats` finds. Only kinds, lanes and tiers that occur are listed.

    ``places`` are bytes of slots and of buffers without one, as if all existed at once. The step
    takes at least ``critical_seconds``, and at least each lane's seconds over its width.
    """

    tasks: int
    edges: int
    kinds: Mapping[TaskKind, Load]
    lanes: Mapping[Lane, Load]
    places: Mapping[Tier, int]
    critical_path: tuple[str, ...]
    critical_seconds: float


def graph_stats(graph: TaskGraph, profile: MachineProfile) -> GraphStats:
    """Statistics of ``graph`` with the durations that ``profile`` predicts."""
    timed = [(task, profile.seconds(task)) for task in graph.tasks]
    places: Counter[Tier] = Counter()
    for slot in graph.slots.values():
        places[slot.tier] += slot.nbytes
    for buffer in graph.buffers.values():
        if not buffer.slot:
            places[buffer.tier] += buffer.nbytes
    path = critical_path(graph, profile)
    return GraphStats(
        tasks=len(graph.tasks),
        edges=sum(map(len, graph.edges.successors)),
        kinds=_loads([(task.kind, task, s) for task, s in timed]),
        lanes=_loads([(task.lane, task, s) for task, s in timed]),
        places=dict(places),
        critical_path=tuple(path),
        critical_seconds=sum(timed[graph.index[name]][1] for name in path),
    )


def _loads(keyed: Sequence[tuple[_Key, Task, float]]) -> dict[_Key, Load]:
    loads: dict[_Key, Load] = {}
    for key, task, seconds in keyed:
        known, cost = loads.get(key, Load()), task.cost
        loads[key] = Load(
            known.tasks + 1,
            known.nbytes + cost.nbytes,
            known.flops + cost.total_flops,
            known.params + cost.params,
            known.seconds + seconds,
        )
    return loads
