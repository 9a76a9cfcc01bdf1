"""The part of a step's graph that holds the final norm, the output matrix and the loss.

With one vocabulary chunk the whole matrix is on the GPU and each micro-batch needs one task. With
several, a first sweep over the chunks collects the softmax denominators and a second one, in
reverse so that the last chunk need not come up again, the gradients.
"""

from __future__ import annotations

from slideformer.graph.chunks import Chunk, VocabChunk, vocab_chunks
from slideformer.graph.products import head_products
from slideformer.graph.step_memory import StepMemory
from slideformer.graph.step_update import UpdateWriter
from slideformer.graph.tasks import Cost, TaskKind


class HeadWriter:
    """Writes those tasks; training leaves the gradient of each micro-batch's boundary behind."""

    def __init__(self, memory: StepMemory, updates: UpdateWriter, *, train: bool) -> None:
        self.memory = memory
        self.spec, self.plan = memory.spec, memory.plan
        self._updates = updates
        self._train = train
        self._micro = range(self.plan.micro_batches)
        self._vocab = vocab_chunks(self.spec, self.plan.vocab_chunks)
        self._resident = memory.resident(self.spec.head.name)
        self._norm: list[str] = []

    @property
    def visits(self) -> list[str]:
        """Keys of the vocabulary chunks in the order in which they need a layer's weight slot."""
        if len(self._vocab) == 1 or self._resident:
            return []
        sweep = [self._key(part) for part in self._vocab]
        return [*sweep, *(reversed(sweep) if self._train else ())]

    def write(self) -> None:
        """Append all tasks from the norm's input to the loss, and back if training."""
        memory, norm = self.memory, self.spec.norm
        self._norm = memory.weights(norm.name, memory.chunks[norm.name], "fwd", slot="w.norm")
        if len(self._vocab) == 1:
            self._one_sweep(self._vocab[0])
        else:
            self._first_sweep()
            if self._train:
                self._second_sweep()
                self._norm_backward()
        if self._train and self.spec.balanced:
            memory.task(
                "loss.router",
                TaskKind.COMPUTE,
                op="balance_loss",
                reads=[memory.loss, memory.balance],
                writes=[memory.loss],
            )
        memory.copy("d2h.loss", TaskKind.D2H, memory.loss, memory.host_loss)
        memory.task("report.loss", TaskKind.CPU, reads=[memory.host_loss])
        if self._train:
            self._updates.finish_unit(norm, memory.gradients.accumulate(norm, "acc.norm"))

    def _one_sweep(self, part: VocabChunk) -> None:
        memory = self.memory
        weights = memory.weights("head", self._chunks(part), "fwd", slot="w.head")
        for m in self._micro:
            x = memory.activations.boundaries[self.spec.norm.name, m]
            reads = [*self._norm, *weights, x, "targets", *([memory.loss] if m else [])]
            writes = [memory.loss]
            if self._train:
                accumulators = [
                    *memory.gradients.accumulate(self.spec.norm, "acc.norm"),
                    *memory.gradients.accumulate_chunks(self._chunks(part), "acc.head"),
                ]
                reads += accumulators if m else []
                memory.activations.boundary_gradient(m)
                writes += [memory.activations.boundaries["dx", m], *accumulators]
            memory.task(
                f"loss.head.m{m}",
                TaskKind.COMPUTE,
                op="loss" if self._train else "evaluate_loss",
                reads=reads,
                writes=writes,
                cost=self._cost(part, products=3 - self.spec.head.frozen if self._train else 1),
                micro=m,
            )
            memory.activations.release(x)
        if self._train:
            self._updates.finish_head(self._chunks(part), "acc.head")

    def _first_sweep(self) -> None:
        memory = self.memory
        for part in self._vocab:
            weights = memory.weights(self._key(part), self._chunks(part), "fwd")
            for m in self._micro:
                x = memory.activations.boundaries[self.spec.norm.name, m]
                stats = memory.softmax_stats(m)
                last = part is self._vocab[-1]
                memory.task(
                    f"stats.head.v{part.index}.m{m}",
                    TaskKind.COMPUTE,
                    op="stats" if self._train else "evaluate_stats",
                    reads=[*self._norm, *weights, x, "targets"]
                    + ([stats] if part.index else [])
                    + ([memory.loss] if last and m else []),
                    writes=[stats, *([memory.loss] if last else [])],
                    cost=self._cost(part, products=1),
                    micro=m,
                    vocab=part.index,
                )
                if last and not self._train:
                    memory.activations.release(x)

    def _second_sweep(self) -> None:
        memory = self.memory
        for part in reversed(self._vocab):
            chunks = self._chunks(part)
            weights = memory.weights(self._key(part), chunks, "bwd")
            accumulators = memory.gradients.accumulate_chunks(chunks, "acc.0")
            for m in self._micro:
                dxn = memory.norm_output_gradient(m)
                x = memory.activations.boundaries[self.spec.norm.name, m]
                stats = memory.softmax_stats(m)
                memory.task(
                    f"grad.head.v{part.index}.m{m}",
                    TaskKind.COMPUTE,
                    reads=[*self._norm, *weights, x, "targets", stats]
                    + ([] if part is self._vocab[-1] else [dxn])
                    + (accumulators if m else []),
                    writes=[dxn, *accumulators],
                    cost=self._cost(part, products=3 - self.spec.head.frozen),
                    micro=m,
                    vocab=part.index,
                )
            self._updates.finish_head(chunks, "acc.0")

    def _norm_backward(self) -> None:
        memory = self.memory
        accumulators = memory.gradients.accumulate(self.spec.norm, "acc.norm")
        for m in self._micro:
            x = memory.activations.boundaries[self.spec.norm.name, m]
            memory.activations.boundary_gradient(m)
            memory.task(
                f"bwd.norm.m{m}",
                TaskKind.COMPUTE,
                op="norm_backward",
                reads=[
                    *self._norm,
                    x,
                    memory.norm_output_gradient(m),
                    *(accumulators if m else []),
                ],
                writes=[memory.activations.boundaries["dx", m], *accumulators],
                cost=Cost(nbytes=4 * memory.activations.nbytes),
                micro=m,
            )
            memory.activations.release(x)

    def _chunks(self, part: VocabChunk) -> tuple[Chunk, ...]:
        chunks = self.memory.chunks[self.spec.head.name]
        return tuple(c for c in chunks if c.vocab == part.index)

    @staticmethod
    def _key(part: VocabChunk) -> str:
        return f"v{part.index}"

    def _cost(self, part: VocabChunk, products: int) -> Cost:
        rows = part.stop - part.start
        return Cost(products=head_products(self.spec, self.plan, rows, products))
