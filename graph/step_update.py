"""The part of a step's graph that turns finished gradients into weights.

The gradients of a streamed unit's chunks are rounded and their squares summed on the GPU
(``finish``); then they go down and the CPU updates them chunk by chunk. A resident unit is updated
on the GPU.

The embedding's gradient has two sides. From the look-up, only the rows of this step's tokens have
one, known when the first layer's backward is done; from a tied output matrix, all rows have one,
known early and parked. Optimizers work element by element, so rows without tokens (``idle``) are
updated early and only the used ones wait for the end.

Deferred, every gradient stays parked until all are known: ``clip`` takes their norm and decides how
they are scaled, and all updates follow it, in the order in which the next forward needs them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from slideformer.graph.buffers import Role, Tier
from slideformer.graph.chunks import Chunk
from slideformer.graph.model import UnitSpec
from slideformer.graph.plan import MemoryPlan
from slideformer.graph.step_memory import StepMemory
from slideformer.graph.tasks import Cost, TaskKind

CLIP = "clip.norm"
"""Task that all deferred updates come after."""


def update_nbytes(plan: MemoryPlan) -> int:
    """Bytes that an update reads and writes per element: gradient, both halves, moments."""
    return 2 + 2 * (4 + plan.optimizer.moment_nbytes)


class UpdateWriter:
    """Writes finish, download and update tasks."""

    def __init__(self, memory: StepMemory) -> None:
        self.memory = memory
        self.spec, self.plan = memory.spec, memory.plan
        self._squares: list[str] = []
        self._on_gpu: list[str] = []
        self._travelled: list[str] = []
        self._deferred: list[tuple[str, Callable[[], None]]] = []

    def finish_unit(self, unit: UnitSpec, accumulators: list[str]) -> None:
        """Update a unit from its accumulators, unless it is frozen."""
        if not unit.frozen:
            self._finish(self.memory.chunks[unit.name], accumulators)

    def finish_head(self, chunks: tuple[Chunk, ...], slot: str) -> None:
        """Update chunks of the output matrix; those of a tied one wait for the look-up's side."""
        if self.spec.head.frozen:
            return
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
        memory, unit = self.memory, chunks[0].unit
        if memory.resident(unit):
            if self.plan.deferred:
                accumulators = self._park(chunks, accumulators)
            self._write(unit, partial(self._update_on_gpu, chunks, accumulators))
            return
        for chunk, staged in memory.gradients.stage_gradients(chunks, accumulators):
            gradient = memory.gradients.download_gradient(chunk, staged)
            self._travelled.append(gradient)
            self._write(unit, partial(self._update, chunk, gradient))

    def _write(self, unit: str, update: Callable[[], None]) -> None:
        """Append an update now, or when all gradients are known."""
        if self.plan.deferred:
            self._deferred.append((unit, update))
        else:
            update()

    def _update(self, chunk: Chunk, gradient: str) -> None:
        memory, name = self.memory, f"{chunk.unit}.{chunk.label}"
        # Deferred, the window no longer has the weights.
        stored = memory.stored.read if self.plan.deferred else memory.stored.prepare
        owned = [*memory.owned(chunk), *stored(chunk)]
        memory.task(
            f"update.{name}",
            TaskKind.CPU_UPDATE,
            reads=[gradient, *owned],
            writes=[*owned, *self._result(name)],
            after=self._decided,
            cost=Cost(params=chunk.numel),
            unit=chunk.unit,
            begin=chunk.begin,
            end=chunk.end,
        )
        memory.stored.write(chunk)

    def _park(self, chunks: Sequence[Chunk], accumulators: list[str]) -> list[str]:
        """Round a resident unit's gradient and keep it on the GPU, with the sum of its squares."""
        memory, name = self.memory, f"{chunks[0].unit}.{chunks[0].label}"
        kept = [memory.gradients.parked_gradient(chunk) for chunk in chunks]
        kept.append(self._square(name, on_gpu=True))
        memory.task(
            f"finish.{name}",
            TaskKind.COMPUTE,
            op="park",
            reads=accumulators,
            writes=kept,
            cost=Cost(nbytes=8 * sum(chunk.numel for chunk in chunks)),
        )
        return kept

    def _update_on_gpu(self, chunks: Sequence[Chunk], gradients: list[str]) -> None:
        memory, unit = self.memory, chunks[0].unit
        begin, end = chunks[0].begin, chunks[-1].end
        owned = [name for c in chunks for name in memory.owned(c)]
        name = f"{unit}.{chunks[0].label}"
        memory.task(
            f"update.{name}",
            TaskKind.COMPUTE,
            op="update_on_gpu",
            reads=[*gradients, *owned],
            writes=[*owned, *self._result(name, on_gpu=True)],
            after=self._decided,
            cost=Cost(nbytes=update_nbytes(self.plan) * (end - begin)),
            unit=unit,
            begin=begin,
            end=end,
        )

    # -- the embedding ---------------------------------------------------------------------------

    def early_rows(self) -> None:
        """Update the idle rows, unless their gradients' arrival on the host has done so."""
        chunks = self.memory.chunks["embed"]
        if self.spec.embed.frozen:
            return
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
        self._rows(label, "idle_rows", chunks, gradients, params=params, begin=begin, end=end)

    def late_rows(self, first: str) -> None:
        """Add the look-up's gradient up row by row and update the used rows."""
        memory = self.memory
        if self.spec.embed.frozen:
            return
        gradients = [memory.activations.boundaries["dx", m] for m in range(self.plan.micro_batches)]
        if not memory.resident("embed"):
            for m, dx in enumerate(gradients):
                gradients[m] = memory.activations.host_boundary_gradient(first, m)
                memory.copy(f"d2h.dx.m{m}", TaskKind.D2H, dx, gradients[m])
        chunks = memory.chunks["embed"]
        if self.spec.tied:
            gradients += [memory.gradients.parked_gradient(c) for c in chunks]
        used = min(self.plan.tokens, self.spec.vocab) * self.spec.hidden
        self._rows("rows", "used_rows", list(chunks), gradients, params=used)

    def _rows(
        self,
        label: str,
        rows: str,
        chunks: list[Chunk],
        gradients: list[str],
        *,
        params: int,
        begin: int = 0,
        end: int = 0,
    ) -> None:
        """An update of some rows of the embedding, by the processor in whose memory they live.

        Deferred, the sum of their gradients' squares is taken at once, where they have any.
        """
        memory, name = self.memory, f"embed.{label}"
        owned = [name for c in chunks for name in memory.owned(c)]
        resident = memory.resident("embed")
        where = "_on_gpu" if resident else ""
        index = ["index"] if resident else []
        moved = Cost(nbytes=update_nbytes(self.plan) * params)

        def update() -> None:
            memory.task(
                f"update.{name}",
                TaskKind.COMPUTE if resident else TaskKind.CPU_UPDATE,
                op=f"update_{rows}{where}",
                reads=[*gradients, *owned, *index],
                writes=[*owned, *self._result(name, on_gpu=resident)],
                after=self._decided,
                cost=moved if resident else Cost(params=params),
                begin=begin,
                end=end,
            )

        if self.plan.deferred and gradients:
            memory.task(
                f"square.{name}",
                TaskKind.COMPUTE if resident else TaskKind.CPU,
                op=f"square_{rows}{where}",
                reads=[*gradients, *index],
                writes=[self._square(name, on_gpu=resident)],
                cost=Cost(nbytes=2 * self.plan.compute.nbytes * params),
                begin=begin,
                end=end,
            )
        self._write("embed", update)

    # -- the norm of all gradients ---------------------------------------------------------------

    @property
    def _decided(self) -> list[str]:
        """What an update waits for beside its gradient: how all of them are scaled."""
        return [CLIP] if self.plan.deferred else []

    def _result(self, name: str, *, on_gpu: bool = False) -> list[str]:
        """What an update writes beside state: its sum of squares, if that is not known before."""
        return [] if self.plan.deferred else [self._square(name, on_gpu=on_gpu)]

    def _square(self, name: str, *, on_gpu: bool) -> str:
        """Eight bytes for the sum of squares of one gradient (FP64), in the slot of its tier."""
        results = self._on_gpu if on_gpu else self._squares
        offset = 8 * len(results)
        results.append(f"square.{name}")
        tier, slot = (Tier.GPU, "squares_on_gpu") if on_gpu else (Tier.CPU, "squares")
        return self.memory.buffer(results[-1], 8, tier, Role.RESULT, slot=slot, offset=offset)

    def close(self) -> None:
        """Add up the squared gradients of all chunks; deferred, then append all updates."""
        memory, reads = self.memory, list(self._squares)
        names = ",".join(name.removeprefix("square.") for name in self._on_gpu)
        if self._on_gpu:
            nbytes = 8 * len(self._on_gpu)
            host = memory.buffer("squares_host", nbytes, Tier.PINNED, Role.RESULT)
            memory.task(
                "d2h.squares",
                TaskKind.D2H,
                op="download_squares",
                reads=self._on_gpu,
                writes=[host],
                cost=Cost(nbytes=nbytes),
            )
            reads.append(host)
        if not self.plan.deferred:
            memory.task("report.norm", TaskKind.CPU, reads=reads, resident=names)
            return
        reads += self._travelled
        memory.task(CLIP, TaskKind.CPU, reads=reads, resident=names)
        order = [unit.name for unit in self.spec.units]
        for _, update in sorted(self._deferred, key=lambda each: order.index(each[0])):
            update()
