"""Questions about a finished graph: order, critical path, due times.

Used once per compiled graph, never inside a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from graphlib import TopologicalSorter

from slideformer.graph.graph import TaskGraph
from slideformer.graph.hazards import HazardMap
from slideformer.graph.profile import MachineProfile
from slideformer.graph.tasks import Lane


def topological_order(graph: TaskGraph) -> list[int]:
    """Task positions, each after all it waits for: program order, unless an ``after`` bends it."""
    if graph.in_order:
        return list(range(len(graph.tasks)))
    return list(TopologicalSorter(dict(enumerate(graph.edges.predecessors))).static_order())


def tails(graph: TaskGraph, profile: MachineProfile) -> list[float]:
    """Seconds of the longest path from each task's start to the end of the graph."""
    seconds = [profile.seconds(task) for task in graph.tasks]
    longest = [0.0] * len(seconds)
    for position in reversed(topological_order(graph)):
        after = max((longest[s] for s in graph.edges.successors[position]), default=0.0)
        longest[position] = seconds[position] + after
    return longest


def critical_path(graph: TaskGraph, profile: MachineProfile) -> list[str]:
    """Names along a longest path through the graph."""
    longest = tails(graph, profile)
    candidates: Sequence[int] = range(len(longest))
    path: list[str] = []
    while candidates:
        position = max(candidates, key=lambda p: longest[p])
        path.append(graph.tasks[position].name)
        candidates = graph.edges.successors[position]
    return path


def next_instance_edges(graph: TaskGraph) -> list[tuple[int, int]]:
    """Pairs (task, task of the following instance of the same graph that waits for it)."""
    hazards: HazardMap[int] = HazardMap()
    for leave in graph.edges.exits:
        for segment in hazards.cut(leave.place, leave.start, leave.stop):
            segment.writer, segment.readers = leave.writer, list(leave.readers)
    edges: set[tuple[int, int]] = set()
    for entry in graph.edges.entries:
        for segment in hazards.cut(entry.place, entry.start, entry.stop):
            if segment.writer is not None:
                edges.add((segment.writer, entry.task))
            if entry.write:
                edges.update((reader, entry.task) for reader in segment.readers)
    return sorted(edges)


def due_times(graph: TaskGraph, profile: MachineProfile) -> list[float]:
    """Latest start of each task, as a share of a step, if the compute lane is never to wait.

    Compute tasks are due one after another in program order. Everything else is due when the first
    task that waits for it is, less its own duration, in this step or the next: an update may take
    until the next forward reaches its layer.
    """
    seconds = [profile.seconds(task) for task in graph.tasks]
    starts: dict[int, float] = {}
    clock = 0.0
    for position, task in enumerate(graph.tasks):
        if task.lane is Lane.COMPUTE:
            starts[position] = clock
            clock += seconds[position]
    period = clock or sum(seconds) or 1.0
    order = topological_order(graph)
    onward: dict[int, list[int]] = {}
    for before, after in next_instance_edges(graph):
        onward.setdefault(before, []).append(after)
    last = _latest_starts(graph, order, seconds, starts, {}, [], 2 * period)
    first = _latest_starts(graph, order, seconds, starts, onward, last, 2 * period)
    return [due / period for due in first]


def _latest_starts(
    graph: TaskGraph,
    order: list[int],
    seconds: list[float],
    starts: dict[int, float],
    onward: dict[int, list[int]],
    following: list[float],
    horizon: float,
) -> list[float]:
    """Backward pass over one instance; ``following`` are the latest starts of the next one."""
    latest, successors = [0.0] * len(order), graph.edges.successors
    period = horizon / 2
    for position in reversed(order):
        if position in starts:
            latest[position] = starts[position]
            continue
        due = min([latest[s] for s in successors[position]], default=horizon)
        if position in onward:
            due = min(due, *(following[s] + period for s in onward[position]))
        latest[position] = due - seconds[position]
    return latest
