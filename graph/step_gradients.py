"""Gradients of a step: accumulated on the GPU, finished, staged, brought down and parked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from slideformer.graph.buffers import Role, Tier
from slideformer.graph.chunks import Chunk
from slideformer.graph.model import UnitSpec
from slideformer.graph.tasks import Cost, TaskKind

if TYPE_CHECKING:
    from slideformer.graph.step_memory import StepMemory

CHECK_NBYTES = 256
"""Bytes behind each travelling gradient chunk for the sum of its squares; keeps chunks aligned."""


class Gradients:
    """Declares those buffers and appends the tasks that finish and move them."""

    def __init__(self, memory: StepMemory) -> None:
        self._memory = memory
        self._plan = memory.plan
        self._staged = 0
        self._downloaded = 0

    def accumulate(self, unit: UnitSpec, slot: str) -> list[str]:
        """Gradient accumulators of a unit's chunks; none if it is frozen."""
        return self._accumulators(
            self._memory.chunks[unit.name], slot, self._plan.layer_accumulator
        )

    def accumulate_chunks(self, chunks: Sequence[Chunk], slot: str) -> list[str]:
        """Gradient accumulators of chunks of the output matrix; none if it is frozen."""
        return self._accumulators(chunks, slot, self._plan.head_accumulator)

    def _accumulators(self, chunks: Sequence[Chunk], slot: str, size: int) -> list[str]:
        if self._memory.spec.unit(chunks[0].unit).frozen:
            return []
        return [
            self._memory.buffer(
                f"acc.{chunk.unit}.{chunk.label}",
                size * chunk.numel,
                Tier.GPU,
                Role.GRADIENT,
                slot=slot,
                offset=size * (chunk.begin - chunks[0].begin),
            )
            for chunk in chunks
        ]

    def finish_gradients(
        self, chunks: Sequence[Chunk], accumulators: Sequence[str], targets: Sequence[str]
    ) -> None:
        """Round finished gradients and append their squares, in one task of the compute lane."""
        numel = sum(chunk.numel for chunk in chunks)
        self._memory.task(
            f"finish.{chunks[0].unit}.{chunks[0].label}",
            TaskKind.COMPUTE,
            reads=accumulators,
            writes=targets,
            cost=Cost(nbytes=6 * numel),
        )

    def stage_gradients(
        self, chunks: Sequence[Chunk], accumulators: Sequence[str]
    ) -> Iterator[tuple[Chunk, str]]:
        """Finish gradients, as many at once as there are staging slots: chunk, staged buffer."""
        group = self._plan.staging_slots
        for first in range(0, len(chunks), group):
            part = slice(first, first + group)
            staged = [self._staged_gradient(chunk) for chunk in chunks[part]]
            self.finish_gradients(chunks[part], accumulators[part], staged)
            yield from zip(chunks[part], staged, strict=True)

    def download_gradient(self, chunk: Chunk, staged: str, host: str = "") -> str:
        """Bring a staged gradient down, into a parking slot or ``host``; returns that."""
        host = host or self._host_gradient(chunk)
        self._memory.copy(f"d2h.{chunk.unit}.{chunk.label}", TaskKind.D2H, staged, host)
        return host

    def _staged_gradient(self, chunk: Chunk) -> str:
        slot = f"g.{self._staged % self._plan.staging_slots}"
        self._staged += 1
        name, nbytes = f"g.{chunk.unit}.{chunk.label}", self._travelling_nbytes(chunk)
        return self._memory.buffer(name, nbytes, Tier.GPU, Role.GRADIENT, slot=slot)

    def _host_gradient(self, chunk: Chunk) -> str:
        position = self._downloaded
        self._downloaded += 1
        slots = self._plan.gradient_slot
        slot = f"gh.{slots[position]}" if slots else ""
        name, nbytes = f"gh.{chunk.unit}.{chunk.label}", self._travelling_nbytes(chunk)
        return self._memory.buffer(name, nbytes, Tier.PINNED, Role.GRADIENT, slot=slot)

    def parked_gradient(self, chunk: Chunk) -> str:
        """A gradient that waits where it was finished or, streamed, on the host.

        That of a tied matrix from the output side, until the look-up's side is known; deferred,
        that of a resident unit.
        """
        name = f"parked.{chunk.unit}.{chunk.label}"
        if not self._memory.resident(chunk.unit):
            return self._memory.buffer(
                name, self._travelling_nbytes(chunk), Tier.PINNED, Role.GRADIENT
            )
        size = self._plan.compute.nbytes  # chunks touch: the GPU updates them all at once
        return self._memory.buffer(
            name,
            size * chunk.numel,
            Tier.GPU,
            Role.GRADIENT,
            slot=f"parked.{chunk.unit}",
            offset=size * chunk.begin,
        )

    def _travelling_nbytes(self, chunk: Chunk) -> int:
        return self._plan.compute.nbytes * chunk.numel + CHECK_NBYTES
