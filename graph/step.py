"""Compile a memory plan into the graph of one training step, of an evaluation, or of a save.

The order of the statements below is the program order from which all edges follow: embedding,
layers forward, output matrix and loss, layers backward, embedding's update. Within a unit the order
is micro-batch by micro-batch, so a unit's weights cross PCIe once per pass.

Slots and host-state buffers shared by the three graphs are declared in ``step_memory.py``.
"""

from __future__ import annotations

from slideformer.graph.buffers import Role, Tier
from slideformer.graph.chunks import Chunk, VocabChunk, vocab_chunks
from slideformer.graph.graph import TaskGraph
from slideformer.graph.model import ModelSpec, UnitSpec
from slideformer.graph.placing import Visit, place_weights
from slideformer.graph.plan import MemoryPlan, forward_flops
from slideformer.graph.step_memory import StepMemory
from slideformer.graph.tasks import Cost, TaskKind


def compile_step(spec: ModelSpec, plan: MemoryPlan) -> TaskGraph:
    """The graph of one optimizer step: forward, backward and every update."""
    return _write_step(spec, plan).build()


def compile_evaluation(spec: ModelSpec, plan: MemoryPlan) -> TaskGraph:
    """The graph of a forward pass that computes the loss and changes no weight."""
    return _write_evaluation(spec, plan).build()


def compile_save(spec: ModelSpec, plan: MemoryPlan) -> TaskGraph:
    """The graph that hands every unit's weights to the checkpoint writer, one unit at a time."""
    return _write_save(spec, plan).build()


def footprint(spec: ModelSpec, plan: MemoryPlan) -> dict[str, tuple[Tier, int]]:
    """Tier and bytes of every place that these three graphs use, without building them."""
    found: dict[str, tuple[Tier, int]] = {}
    for write in (_write_step, _write_evaluation, _write_save):
        for name, (tier, nbytes) in write(spec, plan).places().items():
            found[name] = (tier, max(nbytes, found.get(name, (tier, 0))[1]))
    return found


def _write_step(spec: ModelSpec, plan: MemoryPlan) -> StepMemory:
    writer = _StepWriter(spec, plan, "step")
    writer.forward()
    writer.head(train=True)
    writer.backward()
    writer.report_norm()
    return writer.memory


def _write_evaluation(spec: ModelSpec, plan: MemoryPlan) -> StepMemory:
    writer = _StepWriter(spec, plan, "evaluate", train=False)
    writer.forward()
    writer.head(train=False)
    return writer.memory


def _write_save(spec: ModelSpec, plan: MemoryPlan) -> StepMemory:
    memory = StepMemory(spec, plan, "save")
    for unit in spec.units:
        chunks = memory.chunks[unit.name]
        memory.task(
            f"save.{unit.name}",
            TaskKind.SAVE,
            reads=[name for c in chunks for name in (memory.hi(c), memory.state(c))],
            cost=Cost(nbytes=4 * unit.numel),
            unit=unit.name,
        )
    return memory


class _StepWriter:
    """Writes the tasks of a step in program order."""

    def __init__(self, spec: ModelSpec, plan: MemoryPlan, name: str, *, train: bool = True) -> None:
        self.spec = spec
        self.plan = plan
        self.memory = StepMemory(spec, plan, name)
        self._offloaded = plan.offloaded if train else 0
        self._train = train
        self._micro = range(plan.micro_batches)
        self._vocab = vocab_chunks(spec, plan.vocab_chunks)
        self._visits = self._place_weights()
        self._weights: dict[str, list[str]] = {}
        self._boundary: dict[tuple[str, int], str] = {}
        self._targets = ""

    # -- weights ---------------------------------------------------------------------------------

    def _place_weights(self) -> list[Visit]:
        layers = [unit.name for unit in self.spec.layers]
        sweep = [f"v{part.index}" for part in self._vocab] if len(self._vocab) > 1 else []
        visits = [*layers, *sweep]
        if self._train:
            visits += [*reversed(sweep), *reversed(layers)]
        return place_weights(visits, self.plan.window)

    def _load(self, key: str, chunks: tuple[Chunk, ...], purpose: str) -> list[str]:
        """The buffers holding a layer's or vocabulary chunk's weights, loaded if they are not there."""
        visit = self._visits.pop(0)
        if visit.load:
            slot = f"w.{visit.slot}"
            self._weights[key] = self.memory.load_chunks(chunks, slot, purpose)
        return self._weights[key]

    # -- forward ---------------------------------------------------------------------------------

    def forward(self) -> None:
        """Gather the embedding's rows and run every layer; leaves the norm's input on the GPU."""
        self._stage_targets()
        first = self.spec.layers[0].name
        for m in self._micro:
            self._gather(first, m)
        for position, unit in enumerate(self.spec.layers):
            weights = self._load(unit.name, self.memory.chunks[unit.name], "fwd")
            follower = self._follower(position)
            for m in self._micro:
                x = self._boundary[unit.name, m]
                out = self.memory.boundary(follower, m)
                self._boundary[follower, m] = out
                self.memory.task(
                    f"fwd.{unit.name}.m{m}",
                    TaskKind.COMPUTE,
                    reads=[*weights, x, *self.memory.constants],
                    writes=[out],
                    cost=Cost(flops=self._flops(unit)),
                    unit=unit.name,
                    micro=m,
                )
                if not self._train or position < self._offloaded:
                    self.memory.release(x)
                if self._train and 0 < position + 1 < self._offloaded:
                    self.memory.offload_boundary(follower, m, out)

    def _follower(self, position: int) -> str:
        layers = self.spec.layers
        return layers[position + 1].name if position + 1 < len(layers) else self.spec.norm.name

    def _flops(self, unit: UnitSpec) -> int:
        return forward_flops(self.spec, unit, self.plan.micro_rows, self.plan.seq_len)

    def _stage_targets(self) -> None:
        memory, nbytes = self.memory, 8 * self.plan.tokens
        staged = memory.buffer("th", nbytes, Tier.PINNED, Role.INPUT)
        self._targets = memory.buffer("targets", nbytes, Tier.GPU, Role.INPUT)
        memory.task("stage.targets", TaskKind.CPU, writes=[staged], cost=Cost(nbytes=nbytes))
        memory.copy("h2d.targets", TaskKind.H2D, staged, self._targets)

    def _gather(self, first: str, m: int) -> None:
        memory = self.memory
        host = memory.host_boundary(first, m)
        memory.task(
            f"gather.embed.m{m}",
            TaskKind.CPU,
            reads=memory.master(self.spec.embed),
            writes=[host],
            cost=Cost(nbytes=2 * memory.boundary_nbytes),
            micro=m,
        )
        x = memory.boundary(first, m)
        memory.copy(f"h2d.x.{first}.m{m}.fwd", TaskKind.H2D, host, x)
        self._boundary[first, m] = x

    # -- output matrix and loss ------------------------------------------------------------------

    def head(self, *, train: bool) -> None:
        """Final norm, output matrix and loss; when training also their gradients and the ``dx.m*``."""
        memory = self.memory
        norm = memory.load_chunks(memory.chunks[self.spec.norm.name], "w.norm", "fwd")
        if len(self._vocab) == 1:
            part = self._vocab[0]
            weights = memory.load_chunks(self._vocab_chunks(part), "w.head", "fwd")
            for m in self._micro:
                self._loss_task(part, m, [*norm, *weights], train=train)
            if train:
                self._finish_head(part)
        else:
            self._sweep(norm, train=train)
        memory.copy("d2h.loss", TaskKind.D2H, memory.loss, memory.host_loss)
        memory.task("report.loss", TaskKind.CPU, reads=[memory.host_loss])
        if train:
            self._finish_unit(self.spec.norm, memory.accumulate(self.spec.norm, "acc.norm"))

    def _vocab_chunks(self, part: VocabChunk) -> tuple[Chunk, ...]:
        chunks = self.memory.chunks[self.spec.head.name]
        return tuple(c for c in chunks if c.vocab == part.index)

    def _loss_task(self, part: VocabChunk, m: int, weights: list[str], *, train: bool) -> None:
        """One vocabulary chunk holds the whole matrix: loss and all gradients in one task."""
        memory = self.memory
        x = self._boundary[self.spec.norm.name, m]
        reads = [*weights, x, self._targets, *([memory.loss] if m else [])]
        writes = [memory.loss]
        if train:
            dx = memory.boundary("dx", m)
            self._boundary["dx", m] = dx
            accumulators = [
                *memory.accumulate(self.spec.norm, "acc.norm"),
                *memory.accumulate_chunks(self._vocab_chunks(part), "acc.head"),
            ]
            reads += accumulators if m else []
            writes += [dx, *accumulators]
        memory.task(
            f"loss.head.m{m}",
            TaskKind.COMPUTE,
            op="loss" if train else "evaluate_loss",
            reads=reads,
            writes=writes,
            cost=self._head_cost(part, products=3 if train else 1),
            micro=m,
        )
        memory.release(x)

    def _sweep(self, norm: list[str], *, train: bool) -> None:
        """Two sweeps over the vocabulary: first the softmax denominators, then the gradients."""
        memory = self.memory
        for part in self._vocab:
            weights = self._load(f"v{part.index}", self._vocab_chunks(part), "fwd")
            for m in self._micro:
                x, stats = self._boundary[self.spec.norm.name, m], memory.softmax_stats(m)
                last = part is self._vocab[-1]
                memory.task(
                    f"stats.head.v{part.index}.m{m}",
                    TaskKind.COMPUTE,
                    reads=[*norm, *weights, x, self._targets]
                    + ([stats] if part.index else [])
                    + ([memory.loss] if last and m else []),
                    writes=[stats, *([memory.loss] if last else [])],
                    cost=self._head_cost(part, products=1),
                    micro=m,
                    vocab=part.index,
                )
                if last and not train:
                    memory.release(x)
        if train:
            self._gradient_sweep(norm)

    def _gradient_sweep(self, norm: list[str]) -> None:
        memory = self.memory
        for part in reversed(self._vocab):
            chunks = self._vocab_chunks(part)
            weights = self._load(f"v{part.index}", chunks, "bwd")
            accumulators = memory.accumulate_chunks(chunks, "acc.0")
            for m in self._micro:
                x, stats = self._boundary[self.spec.norm.name, m], memory.softmax_stats(m)
                dxn = memory.norm_output_gradient(m)
                first = part is self._vocab[-1]
                memory.task(
                    f"grad.head.v{part.index}.m{m}",
                    TaskKind.COMPUTE,
                    reads=[*norm, *weights, x, self._targets, stats]
                    + ([] if first else [dxn])
                    + (accumulators if m else []),
                    writes=[dxn, *accumulators],
                    cost=self._head_cost(part, products=3),
                    micro=m,
                    vocab=part.index,
                )
            self._finish_head(part)
        accumulators = memory.accumulate(self.spec.norm, "acc.norm")
        for m in self._micro:
            x, dx = self._boundary[self.spec.norm.name, m], memory.boundary("dx", m)
            self._boundary["dx", m] = dx
            memory.task(
                f"bwd.norm.m{m}",
                TaskKind.COMPUTE,
                op="norm_backward",
                reads=[*norm, x, memory.norm_output_gradient(m), *(accumulators if m else [])],
                writes=[dx, *accumulators],
                cost=Cost(nbytes=4 * memory.boundary_nbytes),
                micro=m,
            )
            memory.release(x)

    def _head_cost(self, part: VocabChunk, products: int) -> Cost:
        rows = part.stop - part.start
        return Cost(flops=products * 2 * rows * self.spec.hidden * self.plan.micro_tokens)

    def _finish_head(self, part: VocabChunk) -> None:
        slot = "acc.head" if len(self._vocab) == 1 else "acc.0"
        chunks = self._vocab_chunks(part)
        accumulators = self.memory.accumulate_chunks(chunks, slot)
        for chunk, accumulator in zip(chunks, accumulators, strict=True):
            if self.spec.tied:  # parked until the embedding's rows have their gradient too
                self.memory.download_gradient(chunk, accumulator, parked=True)
                self._update_idle_rows(chunk)
            else:
                self._finish_chunk(chunk, accumulator)

    # -- backward --------------------------------------------------------------------------------

    def backward(self) -> None:
        """Recompute and differentiate each layer, last first; update each as its gradient lands."""
        memory = self.memory
        if not self.spec.tied:
            for chunk in memory.chunks["embed"]:
                self._update_idle_rows(chunk)
        for position in reversed(range(len(self.spec.layers))):
            unit = self.spec.layers[position]
            weights = self._load(unit.name, memory.chunks[unit.name], "bwd")
            accumulators = memory.accumulate(unit, "acc.0")
            for m in self._micro:
                if position < self._offloaded:
                    self._boundary[unit.name, m] = memory.reload_boundary(unit.name, m)
                x, dx = self._boundary[unit.name, m], self._boundary["dx", m]
                memory.task(
                    f"bwd.{unit.name}.m{m}",
                    TaskKind.COMPUTE,
                    reads=[*weights, x, dx, *memory.constants, *(accumulators if m else [])],
                    writes=[dx, *accumulators],
                    cost=Cost(flops=3 * self._flops(unit)),
                    unit=unit.name,
                    micro=m,
                )
                memory.release(x)
            if position == 0:
                self._download_embedding_gradient()
            self._finish_unit(unit, accumulators)

    def _finish_unit(self, unit: UnitSpec, accumulators: list[str]) -> None:
        for chunk, accumulator in zip(self.memory.chunks[unit.name], accumulators, strict=True):
            self._finish_chunk(chunk, accumulator)

    def _finish_chunk(self, chunk: Chunk, accumulator: str) -> None:
        """Round a chunk's gradient, bring it down and update its master and moments."""
        memory = self.memory
        gradient = memory.download_gradient(chunk, accumulator, parked=False)
        owned = [memory.hi(chunk), memory.state(chunk)]
        memory.task(
            f"update.{chunk.unit}.{chunk.label}",
            TaskKind.CPU_UPDATE,
            reads=[gradient, *owned],
            writes=[*owned, memory.norm_part(f"{chunk.unit}.{chunk.label}")],
            cost=Cost(params=chunk.numel),
            unit=chunk.unit,
            begin=chunk.begin,
            end=chunk.end,
        )

    # -- the embedding's update ------------------------------------------------------------------

    def _update_idle_rows(self, chunk: Chunk) -> None:
        """Update the rows of a chunk that no token of this step uses: nothing else is due for them."""
        memory = self.memory
        owned = [memory.hi(chunk), memory.state(chunk)]
        gradient = [memory.parked_gradient(chunk)] if self.spec.tied else []
        memory.task(
            f"update.embed.{chunk.label}",
            TaskKind.CPU_UPDATE,
            op="update_idle_rows",
            reads=[*gradient, *owned],
            writes=[*owned, memory.norm_part(f"embed.{chunk.label}")],
            cost=Cost(params=chunk.numel),
            begin=chunk.begin,
            end=chunk.end,
        )

    def _download_embedding_gradient(self) -> None:
        """The embedding's rows used in this step: gradients down, then summed and updated at once."""
        memory = self.memory
        first = self.spec.layers[0].name
        downloaded = []
        for m in self._micro:
            dx = self._boundary["dx", m]
            downloaded.append(memory.host_boundary_gradient(first, m))
            memory.copy(f"d2h.dx.m{m}", TaskKind.D2H, dx, downloaded[-1])
            memory.release(dx)
        embed = memory.chunks["embed"]
        owned = memory.master(self.spec.embed)
        parked = [memory.parked_gradient(c) for c in embed] if self.spec.tied else []
        memory.task(
            "update.embed.rows",
            TaskKind.CPU_UPDATE,
            op="update_used_rows",
            reads=[*downloaded, *parked, *owned],
            writes=[*owned, memory.norm_part("embed.rows")],
            cost=Cost(params=min(self.plan.tokens, self.spec.vocab) * self.spec.hidden),
        )

    def report_norm(self) -> None:
        """Add up the squared gradients of all chunks."""
        parts = self.memory.norm_parts
        self.memory.task("report.norm", TaskKind.CPU, reads=parts)
