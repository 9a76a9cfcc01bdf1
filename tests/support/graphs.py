"""Random task graphs that keep every rule, and a plain sequential machine that runs them.

`task_graphs` draws tasks of all kinds over buffers that share slots, overlap and are carried. It
keeps its own account of whose bytes are where, byte by byte, and draws only reads that find their
buffer whole.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from hypothesis import strategies as st

from slideformer.graph.buffers import Buffer, Tier
from slideformer.graph.builder import GraphBuilder
from slideformer.graph.graph import TaskGraph
from slideformer.graph.tasks import Cost, Task, TaskKind
from slideformer.runtime.device import Operation

_HOST = (Tier.PINNED, Tier.CPU)
_MAY_TOUCH: dict[TaskKind, tuple[tuple[Tier, ...], tuple[Tier, ...]]] = {
    TaskKind.H2D: (_HOST, (Tier.GPU,)),
    TaskKind.D2H: ((Tier.GPU,), _HOST),
    TaskKind.COMPUTE: ((Tier.GPU,), (Tier.GPU,)),
    TaskKind.CPU_UPDATE: (_HOST, _HOST),
    TaskKind.CPU: (_HOST, _HOST),
    TaskKind.NVME_READ: ((Tier.NVME,), (Tier.GPU, *_HOST)),
    TaskKind.NVME_WRITE: ((Tier.GPU, *_HOST), (Tier.NVME,)),
    TaskKind.SAVE: (tuple(Tier), (Tier.NVME,)),
}
"""Tiers that each kind reads and writes."""


@st.composite
def task_graphs(draw: st.DrawFn, *, max_tasks: int = 14, places: str = "") -> TaskGraph:
    """A valid graph; those drawn with the same ``places`` prefix have places in common."""
    builder = GraphBuilder(draw(st.sampled_from(["one", "two"])))
    buffers = _draw_buffers(draw, builder, places)
    owners: dict[tuple[str, int], str] = {}
    carried_bytes: dict[tuple[str, int], str] = {}
    for buffer in buffers:
        if buffer.carried:
            owners.update(dict.fromkeys(bytes_of(buffer), buffer.name))
            carried_bytes.update(dict.fromkeys(bytes_of(buffer), buffer.name))
    names: list[str] = []
    kinds = draw(st.lists(st.sampled_from(TaskKind), min_size=1, max_size=4))
    for number in range(draw(st.integers(0, max_tasks))):
        kind = draw(st.sampled_from(kinds))
        readable, writable = _MAY_TOUCH[kind]
        whole = [
            b.name
            for b in buffers
            if b.tier in readable and all(owners.get(x) == b.name for x in bytes_of(b))
        ]
        free = [
            b.name
            for b in buffers
            if b.tier in writable
            and all(carried_bytes.get(x, b.name) == b.name for x in bytes_of(b))
        ]
        reads = draw(st.lists(st.sampled_from(whole), max_size=3)) if whole else []
        by_name = {b.name: b for b in buffers}
        writes: list[str] = []
        for written in draw(st.lists(st.sampled_from(free), max_size=2)) if free else []:
            others = (by_name[each] for each in (*reads, *writes) if each != written)
            if all(set(bytes_of(each)).isdisjoint(bytes_of(by_name[written])) for each in others):
                writes.append(written)
        after = draw(st.lists(st.sampled_from(names), max_size=1)) if names else []
        seconds = draw(st.integers(0, 8))
        name = builder.task(
            f"t{number}.x",
            kind,
            op="mix",
            reads=reads,
            writes=writes,
            after=after,
            cost=Cost(seconds=float(seconds)),
        )
        names.append(name)
        for written in writes:
            owners.update(dict.fromkeys(bytes_of(by_name[written]), written))
    return builder.build()


def _draw_buffers(draw: st.DrawFn, builder: GraphBuilder, places: str) -> list[Buffer]:
    buffers: list[Buffer] = []
    for number in range(draw(st.integers(0, 3))):
        tier = draw(st.sampled_from(Tier))
        slot = builder.slot(f"{places}slot{number}{tier}", tier, 8)
        for inner in range(draw(st.integers(1, 4))):
            start = draw(st.integers(0, 7))
            size = draw(st.integers(1, 8 - start))
            buffers.append(Buffer(f"{slot}.b{inner}", size, tier, slot=slot, offset=start))
    for number in range(draw(st.integers(0, 5))):
        tier = draw(st.sampled_from(Tier))
        size = draw(st.integers(1, 3))
        buffers.append(Buffer(f"{places}loose{number}{tier}{size}", size, tier))
    taken: set[tuple[str, int]] = set()
    result = []
    for buffer in buffers:
        carried = draw(st.booleans()) and taken.isdisjoint(bytes_of(buffer))
        if carried:
            taken.update(bytes_of(buffer))
        builder.buffer(
            buffer.name,
            buffer.nbytes,
            buffer.tier,
            slot=buffer.slot,
            offset=buffer.offset,
            carried=carried,
        )
        result.append(
            Buffer(
                buffer.name,
                buffer.nbytes,
                buffer.tier,
                slot=buffer.slot,
                offset=buffer.offset,
                carried=carried,
            )
        )
    return result


def bytes_of(buffer: Buffer) -> Iterator[tuple[str, int]]:
    """Every byte of a buffer, by place and position."""
    for position in range(buffer.offset, buffer.stop):
        yield buffer.place, position


def accesses(graph: TaskGraph, task: Task) -> tuple[set[tuple[str, int]], set[tuple[str, int]]]:
    """All bytes that a task reads, and all that it writes."""
    read = {x for name in task.reads for x in bytes_of(graph.buffers[name])}
    written = {x for name in task.writes for x in bytes_of(graph.buffers[name])}
    return read, written


def conflicts(programs: Sequence[TaskGraph]) -> set[tuple[int, int]]:
    """Pairs of tasks, numbered through all programs, that must keep their order.

    Straight from the definition: they touch a common byte and one of them writes it, or ``after``
    says so.
    """
    touched = [accesses(graph, task) for graph in programs for task in graph.tasks]
    found: set[tuple[int, int]] = set()
    for later in range(len(touched)):
        read, written = touched[later]
        for earlier in range(later):
            read_before, written_before = touched[earlier]
            if written & (read_before | written_before) or read & written_before:
                found.add((earlier, later))
    first = 0
    for graph in programs:
        for position, task in enumerate(graph.tasks):
            found.update((first + graph.index[name], first + position) for name in task.after)
        first += len(graph.tasks)
    return found


def closure(pairs: Iterable[tuple[int, int]], size: int) -> list[set[int]]:
    """All tasks that must come before each task; pairs lead from a lower to a higher number."""
    before: list[set[int]] = [set() for _ in range(size)]
    for earlier, later in sorted(pairs, key=lambda pair: pair[1]):
        assert earlier < later
        before[later] |= {earlier} | before[earlier]
    return before


@dataclass
class Machine:
    """Memory as one integer per byte, and what every task saw when it ran."""

    memory: dict[tuple[str, int], int] = field(default_factory=dict)
    seen: dict[tuple[str, str], tuple[int, ...]] = field(default_factory=dict)

    def operation(self, graph: TaskGraph, task: Task) -> Operation:
        """Reads all bytes, mixes them with the task's name and the context, writes all bytes."""
        reads = [x for name in task.reads for x in bytes_of(graph.buffers[name])]
        writes = [x for name in task.writes for x in bytes_of(graph.buffers[name])]

        def run(context: str) -> None:
            values = tuple(self.memory.get(x, 0) for x in reads)
            self.seen[context, task.name] = values
            mixed = zlib.crc32(repr((context, task.name, values)).encode())
            for position, x in enumerate(writes):
                self.memory[x] = mixed + position

        return run

    def operations(self, graph: TaskGraph) -> list[Operation]:
        """The operations of all tasks."""
        return [self.operation(graph, task) for task in graph.tasks]


def run_sequentially(programs: Sequence[TaskGraph]) -> Machine:
    """Every task in program order, one program after another; contexts are "0", "1", …"""
    machine = Machine()
    for number, graph in enumerate(programs):
        for operation in machine.operations(graph):
            operation(str(number))
    return machine


def step_like(layers: int, *, update: float = 1.0) -> TaskGraph:
    """A training step in small: every task takes a second, updates take ``update`` seconds.

    Each layer's weights come up for its forward; its backward's gradient goes down and updates
    them. Backward goes through the layers in reverse, and the next step's forward begins with the
    first.
    """
    builder = GraphBuilder("step")
    weights = [builder.buffer(f"w{i}", 4, Tier.PINNED, carried=True) for i in range(layers)]
    x = builder.buffer("x", 4, Tier.GPU)
    one = Cost(seconds=1.0)
    for i in range(layers):
        slot = builder.buffer(f"g{i}", 4, Tier.GPU)
        builder.task(f"h2d.L{i}", TaskKind.H2D, reads=[weights[i]], writes=[slot], cost=one)
        reads = [slot, x] if i else [slot]
        builder.task(f"fwd.L{i}", TaskKind.COMPUTE, reads=reads, writes=[x], cost=one)
    for i in reversed(range(layers)):
        gradient = builder.buffer(f"dg{i}", 4, Tier.GPU)
        host = builder.buffer(f"dh{i}", 4, Tier.PINNED)
        builder.task(f"bwd.L{i}", TaskKind.COMPUTE, reads=[x], writes=[x, gradient], cost=one)
        builder.task(f"d2h.L{i}", TaskKind.D2H, reads=[gradient], writes=[host], cost=one)
        builder.task(
            f"update.L{i}",
            TaskKind.CPU_UPDATE,
            reads=[host, weights[i]],
            writes=[weights[i]],
            cost=Cost(seconds=update),
        )
    return builder.build()
