"""The part of a step's graph that turns finished gradients into weights.

The gradients of a streamed unit's chunks are rounded and their norms taken on the GPU (``finish``);
then they go down and the CPU updates them chunk by chunk. A resident unit is updated on the GPU.

The embedding's gradient has two sides. From the look-up, only the rows of this step's tokens have
one, known when the first layer's backward is done; from a tied output matrix, all rows have one,
known early and parked. AdamW works element by element, so rows without tokens (``idle``) are
updated early and only the used ones wait for the end.
"""

from __future__ import annotations

from collections.abc import Sequence

from slideformer.graph.buffers import Role, Tier
from slideformer.graph.chunks import Chunk
from slideformer.graph.model import UnitSpec
from slideformer.graph.step_memory import StepMemory
from slideformer.graph.tasks import Cost, TaskKind


class UpdateWriter:
    """Writes finish, download and update tasks."""

    def __init__(self, memory: StepMemory) -> None:
        self.memory = memory
        self.spec, self.plan = memory.spec, memory.plan
        self._squares: list[str] = []
        self._norms: list[str] = []

    def finish_unit(self, unit: UnitSpec, accumulators: list[str]) -> None:
        """Update a unit from its accumulators."""
        self._finish(self.memory.chunks[unit.name], accumulators)

    def finish_head(self, chunks: tuple[Chunk, ...], slot: str) -> None:
        """Update chunks of the output matrix; those of a tied one wait for the look-up's side."""
        memory, accumulators = self.memory, self.memory.gradients.accumulate_chunks(chunks, slot)
        if not self.spec.tied:
            self._finish(chunks, accumulators)
            return
        if memory.resident("embed"):
            parked = [memory.gradients.parked_gradient(chunk) for chunk in chunks]
            memory.gradients.finish_gradients(chunks, accumulators, parked)
            return
        for chunk, staged in memory.gradients.stage_gradients(chunks, accumulators):
            memory.gradients.download_gradient(
                chunk, staged, memory.gradients.parked_gradient(chunk)
            )
            self._idle_rows([chunk], chunk.label)

    def _finish(self, chunks: Sequence[Chunk], accumulators: list[str]) -> None:
        memory = self.memory
        if memory.resident(chunks[0].unit):
            self._update_on_gpu(chunks, accumulators)
            return
        for chunk, staged in memory.gradients.stage_gradients(chunks, accumulators):
            gradient = memory.gradients.download_gradient(chunk, staged)
            name = f"{chunk.unit}.{chunk.label}"
            owned = [*memory.owned(chunk), *memory.stored.prepare(chunk)]
            memory.task(
                f"update.{name}",
                TaskKind.CPU_UPDATE,
                reads=[gradient, *owned],
                writes=[*owned, self._square(name)],
                cost=Cost(params=chunk.numel),
                unit=chunk.unit,
                begin=chunk.begin,
                end=chunk.end,
            )
            memory.stored.write(chunk)

    def _update_on_gpu(self, chunks: Sequence[Chunk], accumulators: list[str]) -> None:
        memory, unit = self.memory, chunks[0].unit
        begin, end = chunks[0].begin, chunks[-1].end
        owned = [name for c in chunks for name in (memory.hi(c), memory.state(c))]
        name = f"{unit}.{chunks[0].label}"
        memory.task(
            f"update.{name}",
            TaskKind.COMPUTE,
            op="update_on_gpu",
            reads=[*accumulators, *owned],
            writes=[*owned, self._norm(name)],
            cost=Cost(nbytes=26 * (end - begin)),
            unit=unit,
            begin=begin,
            end=end,
        )

    # -- the embedding ---------------------------------------------------------------------------

    def early_rows(self) -> None:
        """Update the idle rows, unless their gradients' arrival on the host has done so."""
        chunks = self.memory.chunks["embed"]
        if self.memory.resident("embed"):
            self._idle_rows(list(chunks), "idle")
        elif not self.spec.tied:
            for chunk in chunks:
                self._idle_rows([chunk], chunk.label)

    def _idle_rows(self, chunks: list[Chunk], label: str) -> None:
        gradients = (
            [self.memory.gradients.parked_gradient(c) for c in chunks] if self.spec.tied else []
        )
        begin, end = chunks[0].begin, chunks[-1].end
        params = end - begin
        self._rows(
            label, "update_idle_rows", chunks, gradients, params=params, begin=begin, end=end
        )

    def late_rows(self, first: str) -> None:
        """Add the look-up's gradient up row by row and update the used rows."""
        memory = self.memory
        gradients = [memory.activations.boundaries["dx", m] for m in range(self.plan.micro_batches)]
        if not memory.resident("embed"):
            for m, dx in enumerate(gradients):
                gradients[m] = memory.activations.host_boundary_gradient(first, m)
                memory.copy(f"d2h.dx.m{m}", TaskKind.D2H, dx, gradients[m])
        chunks = memory.chunks["embed"]
        if self.spec.tied:
            gradients += [memory.gradients.parked_gradient(c) for c in chunks]
        used = min(self.plan.tokens, self.spec.vocab) * self.spec.hidden
        self._rows("rows", "update_used_rows", list(chunks), gradients, params=used)
        for m in range(self.plan.micro_batches):
            memory.activations.release(memory.activations.boundaries["dx", m])

    def _rows(
        self,
        label: str,
        op: str,
        chunks: list[Chunk],
        gradients: list[str],
        *,
        params: int,
        begin: int = 0,
        end: int = 0,
    ) -> None:
        """An update of some rows of the embedding, by the processor in whose memory they live."""
        memory = self.memory
        owned = [name for c in chunks for name in (memory.hi(c), memory.state(c))]
        resident = memory.resident("embed")
        result = (self._norm if resident else self._square)(f"embed.{label}")
        memory.task(
            f"update.embed.{label}",
            TaskKind.COMPUTE if resident else TaskKind.CPU_UPDATE,
            op=f"{op}_on_gpu" if resident else op,
            reads=[*gradients, *owned, *(["index"] if resident else [])],
            writes=[*owned, result],
            cost=Cost(nbytes=26 * params) if resident else Cost(params=params),
            begin=begin,
            end=end,
        )

    # -- the norm of all gradients ---------------------------------------------------------------

    def _square(self, name: str) -> str:
        """Eight bytes for one CPU update's sum of squared gradients (FP64)."""
        return self._result(self._squares, "square", name, 8, Tier.CPU)

    def _norm(self, name: str) -> str:
        """Four bytes for the norm of one chunk's gradient that stays on the GPU (FP32)."""
        return self._result(self._norms, "norm", name, 4, Tier.GPU)

    def _result(self, results: list[str], kind: str, name: str, nbytes: int, tier: Tier) -> str:
        """The next of the numbers that lie one after another in a slot of their kind."""
        offset = nbytes * len(results)
        results.append(f"{kind}.{name}")
        return self.memory.buffer(
            results[-1], nbytes, tier, Role.RESULT, slot=f"{kind}s", offset=offset
        )

    def report_norm(self) -> None:
        """Add up the squared gradients of all chunks."""
        memory, reads = self.memory, list(self._squares)
        names = ",".join(name.removeprefix("norm.") for name in self._norms)
        if self._norms:
            nbytes = 4 * len(self._norms)
            host = memory.buffer("norms_host", nbytes, Tier.PINNED, Role.RESULT)
            memory.task(
                "d2h.norms",
                TaskKind.D2H,
                op="download_norms",
                reads=self._norms,
                writes=[host],
                cost=Cost(nbytes=nbytes),
            )
            reads.append(host)
        memory.task("report.norm", TaskKind.CPU, reads=reads, resident=names)
