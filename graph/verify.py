"""The rules that every graph keeps, checked before anything is allocated or run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from graphlib import CycleError, TopologicalSorter

from slideformer.graph.buffers import HOST_TIERS, Buffer, Tier
from slideformer.graph.errors import GraphError, shown
from slideformer.graph.graph import TaskGraph
from slideformer.graph.hazards import HazardMap, Segment
from slideformer.graph.tasks import LONGEST, Task, TaskKind, TaskName

_GPU = frozenset({Tier.GPU})
_NVME = frozenset({Tier.NVME})
_ANY = frozenset(Tier)

_TIERS: dict[TaskKind, tuple[frozenset[Tier], frozenset[Tier]]] = {
    TaskKind.H2D: (HOST_TIERS, _GPU),
    TaskKind.D2H: (_GPU, HOST_TIERS),
    TaskKind.COMPUTE: (_GPU, _GPU),
    TaskKind.CPU_UPDATE: (HOST_TIERS, HOST_TIERS),
    TaskKind.CPU: (HOST_TIERS, HOST_TIERS),
    TaskKind.NVME_READ: (_NVME, _ANY - _NVME),
    TaskKind.NVME_WRITE: (_ANY - _NVME, _NVME),
    TaskKind.SAVE: (_ANY, _NVME),
}
"""Kind → tiers it may read and tiers it may write."""

_SHOWN = 20


def verify(graph: TaskGraph) -> None:
    """Raise one `GraphError` that lists every broken rule of ``graph``, each with its task or
    buffer.

    Rules: names are well formed; sizes and costs fit; buffers lie inside their slots and in their
    slots' tier; each kind touches only the tiers of its lane; what a task writes shares no bytes
    with its other buffers; what is read was written before and not overwritten since; ``after``
    makes no cycle.
    """
    problems = [*_check_places(graph), *_check_tasks(graph)]
    if not problems:  # the remaining rules need every name to resolve
        problems = [*_check_contents(graph), *_check_cycles(graph)]
    if problems:
        raise GraphError(listed(f"graph {graph.name!r} breaks {len(problems)} rule(s)", problems))


def listed(heading: str, problems: Sequence[str]) -> str:
    """The first twenty problems, each on a line of its own below the heading; the rest counted."""
    more = [f"… and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
    return "\n  ".join([f"{heading}:", *problems[:_SHOWN], *more])


def _check_places(graph: TaskGraph) -> Iterator[str]:
    for slot in graph.slots.values():
        if not _is_size(slot.nbytes):
            yield f"slot {slot.name}: size {_no_size(slot.nbytes)}"
        if slot.name in graph.buffers:
            yield f"slot {slot.name}: a buffer has the same name"
    for buffer in graph.buffers.values():
        yield from _check_buffer(graph, buffer)


def _check_buffer(graph: TaskGraph, buffer: Buffer) -> Iterator[str]:
    for what, value in (("size", buffer.nbytes), ("offset", buffer.offset)):
        if not _is_size(value):
            yield f"buffer {buffer.name}: {what} {_no_size(value)}"
            return
    if not buffer.slot:
        return
    slot = graph.slots.get(buffer.slot)
    if slot is None:
        yield f"buffer {buffer.name}: slot {buffer.slot!r} does not exist"
    elif slot.tier is not buffer.tier:
        yield f"buffer {buffer.name}: tier {buffer.tier}, but slot {slot.name} is in {slot.tier}"
    elif buffer.stop > slot.nbytes:
        yield (
            f"buffer {buffer.name}: bytes {buffer.offset}–{buffer.stop} do not fit into "
            f"slot {slot.name} of {slot.nbytes}"
        )


def _check_tasks(graph: TaskGraph) -> Iterator[str]:
    for task in graph.tasks:
        try:
            TaskName.parse(task.name)
        except GraphError as error:
            yield str(error)
        for names, allowed, verb in zip(
            (task.reads, task.writes), _TIERS[task.kind], ("reads", "writes"), strict=True
        ):
            for name in names:
                buffer = graph.buffers.get(name)
                if buffer is None:
                    yield f"task {task.name}: {verb} {name!r}, which does not exist"
                elif buffer.tier not in allowed:
                    tiers = ", ".join(sorted(allowed))
                    yield (
                        f"task {task.name}: {verb} {name} in {buffer.tier}; {task.kind} may only "
                        f"use {tiers}"
                    )
        yield from _check_overlaps(graph, task)
        yield from _check_cost(task)
        for name in task.after:
            if name not in graph.index:
                yield f"task {task.name}: runs after {name!r}, which does not exist"
    for name, count in Counter(task.name for task in graph.tasks).items():
        if count > 1:
            yield f"task {name}: {count} tasks have this name"


def _check_cost(task: Task) -> Iterator[str]:
    """What a duration is computed from: a wrong one would stop the clock or turn it back."""
    cost = task.cost
    sizes = [("nbytes", cost.nbytes, 0), ("flops", cost.flops, 0), ("params", cost.params, 0)]
    for number, product in enumerate(cost.products):
        where = f"products.{number}"
        sizes.append((f"{where}.flops", product.flops, 0))
        sizes += [(f"{where}.tokens", product.tokens, 1), (f"{where}.width", product.width, 1)]
    for part, value, least in sizes:
        if not _is_size(value, least):
            yield f"task {task.name}: cost.{part} {_no_size(value, least)}"
    seconds = cost.seconds
    if seconds is not None and not (isinstance(seconds, int | float) and 0 <= seconds <= LONGEST):
        yield (
            f"task {task.name}: cost.seconds is {shown(seconds):.80}, not a number from 0 to "
            f"{LONGEST:g}"
        )


def _is_size(value: object, least: int = 0) -> bool:
    return isinstance(value, int) and least <= value < 1 << 63


def _no_size(value: object, least: int = 0) -> str:
    return f"is {shown(value):.80}, not a whole number from {least} to less than 2^63"


def _check_overlaps(graph: TaskGraph, task: Task) -> Iterator[str]:
    """What a task writes must not change its other buffers; in place it is one buffer."""
    names = dict.fromkeys((*task.reads, *task.writes))
    used = [graph.buffers[name] for name in names if name in graph.buffers]
    by_place: dict[str, list[Buffer]] = {buffer.place: [] for buffer in used}
    if len(by_place) == len(used):  # nearly always
        return
    for buffer in used:
        by_place[buffer.place].append(buffer)
    for place, buffers in by_place.items():
        furthest: Buffer | None = None  # of those that begin no later
        furthest_written: Buffer | None = None
        for buffer in sorted(buffers, key=lambda each: each.offset):
            written = buffer.name in task.writes
            other = furthest if written else furthest_written
            if other is not None and buffer.nbytes and other.stop > buffer.offset:
                yield (
                    f"task {task.name}: {other.name} and {buffer.name} share bytes of {place} "
                    "while it writes; move one, or name one buffer as read and written"
                )
            if furthest is None or buffer.stop > furthest.stop:
                furthest = buffer
            if written and (furthest_written is None or buffer.stop > furthest_written.stop):
                furthest_written = buffer


def _check_contents(graph: TaskGraph) -> Iterator[str]:
    """Replay in program order: each read must find its own buffer's bytes."""
    hazards: HazardMap[int] = HazardMap()

    def bytes_of(buffer: Buffer) -> list[Segment[int]]:
        if buffer.slot and not buffer.nbytes:  # shares no byte with the others of its slot
            return []
        return hazards.cut(buffer.place, buffer.offset, buffer.stop)

    overlap = False
    for buffer in graph.buffers.values():
        if buffer.carried:
            for segment in bytes_of(buffer):
                if segment.owner is not None:
                    overlap = True
                    yield f"buffers {segment.owner} and {buffer.name} are both carried and overlap"
                segment.owner = buffer.name
    if overlap:  # every read of them would be reported as well
        return
    for position, task in enumerate(graph.tasks):
        for name in task.reads:
            buffer = graph.buffers[name]
            for segment in bytes_of(buffer):
                if segment.owner is None:
                    yield f"task {task.name}: reads {name} before anything has written it"
                    break
                if segment.owner != name:
                    by = _writer(graph, segment)
                    yield f"task {task.name}: reads {name}, overwritten by {by} since"
                    break
        for name in task.writes:
            buffer = graph.buffers[name]
            for segment in bytes_of(buffer):
                segment.owner, segment.writer = name, position
    for buffer in graph.buffers.values():
        if buffer.carried:
            for segment in bytes_of(buffer):
                if segment.owner != buffer.name:
                    by = _writer(graph, segment)
                    yield f"buffer {buffer.name}: carried, but overwritten by {by}"
                    break


def _writer(graph: TaskGraph, segment: Segment[int]) -> str:
    """Whose contents bytes hold, and the task that wrote them, if any."""
    if segment.writer is None:
        return f"{segment.owner}"
    return f"{segment.owner} of task {graph.tasks[segment.writer].name}"


def _check_cycles(graph: TaskGraph) -> Iterator[str]:
    if graph.in_order:
        return
    try:
        TopologicalSorter(dict(enumerate(graph.edges.predecessors))).prepare()
    except CycleError as error:
        # CycleError lists each task before the one that waits for it
        names = " -> ".join(graph.tasks[position].name for position in error.args[1])
        yield f"tasks wait for each other: {names}"
