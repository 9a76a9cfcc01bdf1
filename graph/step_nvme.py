"""What a step keeps on NVMe, and the host slots through which it passes.

Of the first ``nvme_moments`` of the streamed, trained layers in `spread` order the moments, of
``nvme_lo`` of those the masters' lower halves, and of ``nvme_hi`` of those the upper halves are
extents: one per chunk, read before the chunk's update and written behind it. Upper halves are read
for forward and for backward, on their way to the GPU; to be updated they come back from there,
since PCIe is many times faster than the disk. Reads run ahead as far as there are free slots, into
the next step too, so that reading one chunk, updating the one before and writing the one before
that overlap. What the GPU exchanges with the disk passes through host memory as well: the slots
there let the disk run ahead of the GPU and behind it without holding the GPU's own slots meanwhile.
Boundaries, which are few bytes, go straight where there is GPUDirect Storage; elsewhere that would
only hide from the graph a copy that host memory sees all the same.

    moments.U.c, lo.U.c, hi.U.c   nvme   an extent per chunk: moments, halves of the master
    away.x.U.m                    nvme   an extent per boundary of a micro-batch
    staged.k              pinned  a chunk's state, to be updated; all slots are used in turn
    wh.k                  pinned  a chunk's upper halves on their way up
    xs.k                  pinned  a boundary on its way down or up
    saved_lo, saved_hi    cpu     a unit's halves put together, to be saved
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

from slideformer.graph.buffers import Role, Tier, whole_pages
from slideformer.graph.chunks import Chunk
from slideformer.graph.model import ModelSpec, UnitSpec
from slideformer.graph.plan import Compute, MemoryPlan, Optimizer
from slideformer.graph.state import HALVES, Part, moment_parts, parts_nbytes, state_parts
from slideformer.graph.tasks import Cost, TaskKind

if TYPE_CHECKING:
    from slideformer.graph.step_memory import StepMemory

Unit = TypeVar("Unit")

RINGS = ("staged", "wh", "xs")
"""Names of those slots in host memory: of each there are ``nvme_slots``, or none if unused."""

MOMENTS, LO, HI = "moments", "lo", "hi"


def kind_parts(kind: str, unit: UnitSpec, optimizer: Optimizer) -> tuple[Part, ...]:
    """The arrays of a unit's state that an extent of a kind holds."""
    if kind == MOMENTS:
        return moment_parts(unit, optimizer)
    return tuple(part for part in HALVES if part.name == kind)


def extent_nbytes(parts: Sequence[Part], numel: int) -> int:
    """Bytes of the extent that holds ``numel`` elements of some arrays."""
    return whole_pages(parts_nbytes(parts, numel))


def spread(units: Sequence[Unit], count: int) -> list[Unit]:
    """``count`` of the units, evenly spread: while others are updated, the disk gets ahead."""
    count = min(count, len(units))
    return [units[i * len(units) // count] for i in range(count)]


def with_streamed_state(spec: ModelSpec, plan: MemoryPlan) -> list[str]:
    """The layers whose optimizer state may be on NVMe: neither resident nor frozen."""
    return [u.name for u in spec.layers if u.name not in plan.resident and not u.frozen]


def units_on_nvme(spec: ModelSpec, plan: MemoryPlan) -> dict[str, tuple[str, ...]]:
    """Unit → kinds of its state that lie on NVMe."""
    moments = spread(with_streamed_state(spec, plan), plan.nvme_moments)
    lo = spread(moments, plan.nvme_lo)
    hi = spread(lo, plan.nvme_hi)
    assert not lo or plan.compute is Compute.BF16, "FP32 compute reads both halves in every pass"
    return {
        unit: (MOMENTS, *([LO] if unit in lo else []), *([HI] if unit in hi else []))
        for unit in moments
    }


def in_memory(unit: UnitSpec, plan: MemoryPlan, kinds: Sequence[str]) -> tuple[Part, ...]:
    """The arrays of a unit's state, beside the upper half, where ``kinds`` are on NVMe."""
    away = {part for kind in kinds for part in kind_parts(kind, unit, plan.optimizer)}
    parts = state_parts(unit, plan.compute, plan.optimizer)[1:]
    return tuple(part for part in parts if part not in away)


def may_store_boundaries(spec: ModelSpec, plan: MemoryPlan) -> list[str]:
    """The layers whose inputs may wait on NVMe: those that are offloaded.

    Never the first layer, as the embedding's rows are gathered into its place in host memory, nor
    one below which nothing is trained, whose input does not wait for backward.
    """
    return [unit.name for unit in spec.layers[max(1, spec.lowest_trained) : plan.offloaded]]


def boundaries_on_nvme(spec: ModelSpec, plan: MemoryPlan) -> list[str]:
    """The layers whose inputs wait on NVMe."""
    return spread(may_store_boundaries(spec, plan), plan.nvme_boundaries)


class StoredState:
    """Declares those buffers and appends their reads and writes."""

    def __init__(self, memory: StepMemory) -> None:
        self._memory = memory
        self._kinds = units_on_nvme(memory.spec, memory.plan)
        self._used: Counter[str] = Counter()

    def has(self, kind: str, unit: str) -> bool:
        """Whether that part of a unit's state is on NVMe."""
        return kind in self._kinds.get(unit, ())

    def not_there(self, unit: UnitSpec) -> tuple[Part, ...]:
        """The arrays of a unit's state, beside the upper half, that are in memory."""
        plan = self._memory.plan
        return in_memory(unit, plan, self._kinds.get(unit.name, ()))

    # -- state, around a chunk's update ----------------------------------------------------------

    def prepare(self, chunk: Chunk) -> list[str]:
        """Bring what is on NVMe of a chunk's state into the next slot, to be updated there.

        Upper halves come down from the GPU, which has them for backward. Returns the buffers.
        """
        kinds = self._kinds.get(chunk.unit, ())
        if not kinds:
            return []
        staged = self._stage(chunk, kinds)
        name, read = f"{chunk.unit}.{chunk.label}", [kind for kind in kinds if kind != HI]
        self._transfer(
            f"read.{name}",
            TaskKind.NVME_READ,
            [self._extent(kind, chunk) for kind in read],
            [staged[kind] for kind in read],
        )
        if HI in kinds:
            weight = self._memory.loaded(chunk)
            copied = f"d2h.{chunk.unit}.hi.{chunk.label}"
            self._memory.copy(copied, TaskKind.D2H, weight, staged[HI])
        return list(staged.values())

    def read(self, chunk: Chunk) -> list[str]:
        """The same, all from NVMe."""
        kinds = self._kinds.get(chunk.unit, ())
        return self._read(chunk, kinds, f"read.{chunk.unit}.{chunk.label}") if kinds else []

    def write(self, chunk: Chunk) -> None:
        """Write what `prepare` returned back to its extents."""
        kinds = self._kinds.get(chunk.unit, ())
        if kinds:
            extents = [self._extent(kind, chunk) for kind in kinds]
            staged = [f"staged.{extent}" for extent in extents]
            self._transfer(
                f"write.{chunk.unit}.{chunk.label}", TaskKind.NVME_WRITE, staged, extents
            )

    def read_master(self, unit: UnitSpec) -> Iterator[str]:
        """Put those of a unit's halves that are on NVMe together in host memory, chunk by chunk.

        Yields the buffers that hold them then.
        """
        memory = self._memory
        kinds = [kind for kind in (LO, HI) if self.has(kind, unit.name)]
        for chunk in memory.chunks[unit.name] if kinds else ():
            name = f"{unit.name}.{chunk.label}"
            staged = self._read(chunk, kinds, f"read.{name}.save")
            saved = [
                memory.buffer(
                    f"saved_{kind}.{name}",
                    2 * chunk.numel,
                    Tier.CPU,
                    Role.WEIGHT,
                    slot=f"saved_{kind}",
                    offset=2 * chunk.begin,
                )
                for kind in kinds
            ]
            memory.task(
                f"unstage.{name}.save",
                TaskKind.CPU,
                reads=staged,
                writes=saved,
                cost=Cost(nbytes=4 * len(kinds) * chunk.numel),
            )
            yield from saved

    def _read(self, chunk: Chunk, kinds: Sequence[str], name: str) -> list[str]:
        staged = list(self._stage(chunk, kinds).values())
        extents = [self._extent(kind, chunk) for kind in kinds]
        self._transfer(name, TaskKind.NVME_READ, extents, staged)
        return staged

    def _stage(self, chunk: Chunk, kinds: Sequence[str]) -> dict[str, str]:
        """Buffers of a chunk's state, one behind another in the next slot."""
        slot = self._next("staged")
        staged: dict[str, str] = {}
        offset = 0
        for kind in kinds:
            nbytes = self._extent_nbytes(kind, chunk)
            staged[kind] = self._memory.buffer(
                f"staged.{kind}.{chunk.unit}.{chunk.label}",
                nbytes,
                Tier.PINNED,
                Role.OPTIMIZER,
                slot=slot,
                offset=offset,
            )
            offset += nbytes
        return staged

    # -- weights, on their way to the GPU --------------------------------------------------------

    def read_weights(self, chunk: Chunk, purpose: str) -> str:
        """Bring a chunk's upper halves into the next slot of pinned memory; returns the buffer."""
        name = f"{chunk.unit}.{purpose}.{chunk.label}"
        nbytes = self._extent_nbytes(HI, chunk)
        staged = self._memory.buffer(
            f"wh.{name}", nbytes, Tier.PINNED, Role.WEIGHT, slot=self._next("wh")
        )
        self._transfer(f"read.{name}", TaskKind.NVME_READ, [self._extent(HI, chunk)], [staged])
        return staged

    # -- activations, from forward to backward ---------------------------------------------------

    def put_away(self, name: str, source: str, nbytes: int) -> None:
        """Bring an activation down and write it to NVMe, where it waits for backward."""
        if self._direct(nbytes):
            away = self._away(name, nbytes)
            self._transfer(f"write.{name}", TaskKind.NVME_WRITE, [source], [away])
            return
        staged = self._staged_activation(f"down.{name}", nbytes)
        self._memory.copy(f"d2h.{name}", TaskKind.D2H, source, staged)
        self._transfer(f"write.{name}", TaskKind.NVME_WRITE, [staged], [self._away(name, nbytes)])

    def bring_back(self, name: str, target: str, nbytes: int) -> None:
        """Read what `put_away` wrote and bring it up again."""
        if self._direct(nbytes):
            away = self._away(name, nbytes)
            self._transfer(f"read.{name}.bwd", TaskKind.NVME_READ, [away], [target])
            return
        staged = self._staged_activation(f"up.{name}", nbytes)
        self._transfer(f"read.{name}.bwd", TaskKind.NVME_READ, [self._away(name, nbytes)], [staged])
        self._memory.copy(f"h2d.{name}.bwd", TaskKind.H2D, staged, target)

    def _direct(self, nbytes: int) -> bool:
        """Whether the GPU and NVMe exchange buffers of this size, which must fill their pages."""
        return self._memory.plan.nvme_direct and whole_pages(nbytes) == nbytes

    def _staged_activation(self, name: str, nbytes: int) -> str:
        return self._memory.buffer(
            name, whole_pages(nbytes), Tier.PINNED, Role.ACTIVATION, slot=self._next("xs")
        )

    def _away(self, name: str, nbytes: int) -> str:
        return self._memory.buffer(f"away.{name}", whole_pages(nbytes), Tier.NVME, Role.ACTIVATION)

    # -- all of them -----------------------------------------------------------------------------

    def _extent(self, kind: str, chunk: Chunk) -> str:
        return self._memory.buffer(
            f"{kind}.{chunk.unit}.{chunk.label}",
            self._extent_nbytes(kind, chunk),
            Tier.NVME,
            Role.WEIGHT if kind == HI else Role.OPTIMIZER,
            carried=True,
        )

    def _extent_nbytes(self, kind: str, chunk: Chunk) -> int:
        memory = self._memory
        parts = kind_parts(kind, memory.spec.unit(chunk.unit), memory.plan.optimizer)
        return extent_nbytes(parts, chunk.numel)

    def _next(self, ring: str) -> str:
        """The slot of a ring that was used longest ago."""
        self._used[ring] += 1
        return f"{ring}.{(self._used[ring] - 1) % self._memory.plan.nvme_slots}"

    def _transfer(
        self, name: str, kind: TaskKind, sources: Sequence[str], targets: Sequence[str]
    ) -> None:
        op = "read_extents" if kind is TaskKind.NVME_READ else "write_extents"
        cost = Cost(nbytes=sum(self._memory.nbytes(source) for source in sources))
        self._memory.task(name, kind, op=op, reads=sources, writes=targets, cost=cost)
