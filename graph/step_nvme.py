"""Optimizer state of a step that lies on NVMe, and the host slots through which it passes.

The moments of the first ``nvme_moments`` of the streamed layers in `spread` order, and the lower
halves of the masters of ``nvme_lo`` of those, are extents: one per chunk, read before the chunk's
update and written behind it. Reads run ahead as far as there are free slots, into the next step
too, so that reading one chunk, updating the one before and writing the one before that overlap.

    moments.U.c, lo.U.c   nvme   an extent per chunk: both moments, lower halves of the master
    staged.k              cpu    a chunk's extents in host memory; the slots are used in turn
    saved_lo              cpu    a unit's lower halves put together, to be saved
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from slideformer.graph.buffers import Role, Tier
from slideformer.graph.chunks import Chunk
from slideformer.graph.model import ModelSpec, UnitSpec
from slideformer.graph.plan import Compute, MemoryPlan
from slideformer.graph.tasks import Cost, TaskKind

if TYPE_CHECKING:
    from slideformer.graph.step_memory import StepMemory

EXTENT_ALIGNMENT = 4096
"""Bytes to whose multiples extents and their places in memory are rounded: direct I/O asks it."""

MOMENTS, LO = "moments", "lo"

_NBYTES = {MOMENTS: 8, LO: 2}
"""Bytes per element of what an extent holds."""


def extent_nbytes(kind: str, numel: int) -> int:
    """Bytes of the extent that holds ``numel`` elements of a kind."""
    return -(-_NBYTES[kind] * numel // EXTENT_ALIGNMENT) * EXTENT_ALIGNMENT


def spread(units: Sequence[str], count: int) -> list[str]:
    """``count`` of the units, evenly spread: while others are updated, the disk gets ahead."""
    count = min(count, len(units))
    return [units[i * len(units) // count] for i in range(count)]


def units_on_nvme(spec: ModelSpec, plan: MemoryPlan) -> dict[str, tuple[str, ...]]:
    """Unit → kinds of its state that lie on NVMe."""
    streamed = [unit.name for unit in spec.layers if unit.name not in plan.resident]
    moments = spread(streamed, plan.nvme_moments)
    lo = set(spread(moments, plan.nvme_lo))
    assert not lo or plan.compute is Compute.BF16, "FP32 compute reads lower halves in every pass"
    return {unit: (MOMENTS, LO) if unit in lo else (MOMENTS,) for unit in moments}


class StoredState:
    """Declares those buffers and appends their reads and writes."""

    def __init__(self, memory: StepMemory) -> None:
        self._memory = memory
        self._kinds = units_on_nvme(memory.spec, memory.plan)
        self._staged = 0

    def has(self, kind: str, unit: str) -> bool:
        """Whether that part of a unit's state is on NVMe."""
        return kind in self._kinds.get(unit, ())

    def read(self, chunk: Chunk) -> list[str]:
        """Bring a chunk's extents into the next slot; returns the buffers there, if it has any."""
        kinds = self._kinds.get(chunk.unit, ())
        return self._read(chunk, kinds, f"read.{chunk.unit}.{chunk.label}") if kinds else []

    def write(self, chunk: Chunk) -> None:
        """Write what `read` returned back to its extents."""
        kinds = self._kinds.get(chunk.unit, ())
        if kinds:
            extents = [self._extent(kind, chunk) for kind in kinds]
            self._memory.task(
                f"write.{chunk.unit}.{chunk.label}",
                TaskKind.NVME_WRITE,
                op="write_extents",
                reads=[f"staged.{extent}" for extent in extents],
                writes=extents,
                cost=self._cost(chunk, kinds),
            )

    def read_lo(self, unit: UnitSpec) -> Iterator[str]:
        """Put a unit's lower halves together in host memory, chunk by chunk, if they are on NVMe.

        Yields the buffers that hold them then.
        """
        if not self.has(LO, unit.name):
            return
        memory = self._memory
        for chunk in memory.chunks[unit.name]:
            name = f"{unit.name}.{chunk.label}"
            staged = self._read(chunk, (LO,), f"read.{name}.save")
            nbytes = _NBYTES[LO] * chunk.numel
            saved = memory.buffer(
                f"saved_lo.{name}",
                nbytes,
                Tier.CPU,
                Role.WEIGHT,
                slot="saved_lo",
                offset=_NBYTES[LO] * chunk.begin,
            )
            memory.task(
                f"unstage.{name}.save",
                TaskKind.CPU,
                reads=staged,
                writes=[saved],
                cost=Cost(nbytes=2 * nbytes),
            )
            yield saved

    def _read(self, chunk: Chunk, kinds: Iterable[str], name: str) -> list[str]:
        memory = self._memory
        slot = f"staged.{self._staged % memory.plan.nvme_slots}"
        self._staged += 1
        extents = [self._extent(kind, chunk) for kind in kinds]
        staged: list[str] = []
        offset = 0
        for kind, extent in zip(kinds, extents, strict=True):
            nbytes = extent_nbytes(kind, chunk.numel)
            staged.append(
                memory.buffer(
                    f"staged.{extent}", nbytes, Tier.CPU, Role.OPTIMIZER, slot=slot, offset=offset
                )
            )
            offset += nbytes
        memory.task(
            name,
            TaskKind.NVME_READ,
            op="read_extents",
            reads=extents,
            writes=staged,
            cost=self._cost(chunk, kinds),
        )
        return staged

    def _extent(self, kind: str, chunk: Chunk) -> str:
        return self._memory.buffer(
            f"{kind}.{chunk.unit}.{chunk.label}",
            extent_nbytes(kind, chunk.numel),
            Tier.NVME,
            Role.OPTIMIZER,
            carried=True,
        )

    @staticmethod
    def _cost(chunk: Chunk, kinds: Iterable[str]) -> Cost:
        return Cost(nbytes=sum(extent_nbytes(kind, chunk.numel) for kind in kinds))
