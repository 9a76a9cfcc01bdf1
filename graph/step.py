"""Compile a memory plan into the graph of a training step, an evaluation, a save or a checkpoint.

The order of the statements below is the program order from which all edges follow: embedding,
layers forward, output matrix and loss, layers backward, embedding's update; deferred, all updates
come last. Within a unit the order is micro-batch by micro-batch, so a unit's weights cross PCIe
once per pass.

Buffers and slots are declared in ``step_memory.py``, the output matrix is in ``step_head.py``,
updates are in ``step_update.py``, saves and checkpoints in ``step_save.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from slideformer.graph.adapters import backward_nbytes, forward_nbytes
from slideformer.graph.buffers import Role, Slot, Tier
from slideformer.graph.graph import TaskGraph
from slideformer.graph.model import ModelSpec, UnitSpec
from slideformer.graph.placing import place_weights
from slideformer.graph.plan import MemoryPlan
from slideformer.graph.products import backward_products, forward_products
from slideformer.graph.step_head import HeadWriter
from slideformer.graph.step_memory import StepMemory
from slideformer.graph.step_save import write_checkpoint, write_save
from slideformer.graph.step_update import UpdateWriter
from slideformer.graph.tasks import Cost, Product, TaskKind


def compile_step(spec: ModelSpec, plan: MemoryPlan) -> TaskGraph:
    """The graph of one optimizer step: forward, backward and every update."""
    return _write_step(spec, plan).build()


def draft_step(spec: ModelSpec, plan: MemoryPlan) -> TaskGraph:
    """The same graph unchecked, for plans that are compared: of those, one is compiled and run."""
    return _write_step(spec, plan).unchecked()


def park_gradients(graph: TaskGraph, slots: Sequence[int]) -> TaskGraph:
    """The graph of a step with its parked gradients, in program order, in the slots numbered so.

    It is what `compile_step` makes of the same plan with ``gradient_slot``.
    """
    buffers, declared = dict(graph.buffers), dict(graph.slots)
    parked = [buffer for name, buffer in graph.buffers.items() if name.startswith("gh.")]
    for number, buffer in zip(slots, parked, strict=True):
        name = f"gh.{number}"
        buffers[buffer.name] = replace(buffer, slot=name)
        nbytes = max(buffer.nbytes, declared[name].nbytes if name in declared else 0)
        declared[name] = Slot(name, buffer.tier, nbytes)
    return replace(graph, buffers=buffers, slots=declared)


def compile_evaluation(spec: ModelSpec, plan: MemoryPlan) -> TaskGraph:
    """The graph of a forward pass that computes the loss and changes no weight."""
    return _write_evaluation(spec, plan).build()


def compile_save(spec: ModelSpec, plan: MemoryPlan) -> TaskGraph:
    """The graph that hands every unit's weights to the writer of a model folder, one at a time."""
    return write_save(spec, plan).build()


def compile_checkpoint(spec: ModelSpec, plan: MemoryPlan) -> TaskGraph:
    """The graph that writes masters and optimizer state, to resume from; trains nothing."""
    return write_checkpoint(spec, plan).build()


def footprint(
    spec: ModelSpec, plan: MemoryPlan, step: TaskGraph | None = None
) -> dict[str, tuple[Tier, int]]:
    """Tier and bytes of every place that these graphs use, without building them.

    ``step`` is that of a step, if there is one already. Without a snapshot, a checkpoint has no
    places of its own.
    """
    found = dict(_write_step(spec, plan).places() if step is None else step.places)
    writers = [_write_evaluation, write_save, *([write_checkpoint] if plan.snapshot else [])]
    for write in writers:
        for name, (tier, nbytes) in write(spec, plan).places().items():
            found[name] = (tier, max(nbytes, found.get(name, (tier, 0))[1]))
    return found


def _write_step(spec: ModelSpec, plan: MemoryPlan) -> StepMemory:
    memory = StepMemory(spec, plan, "step")
    updates = UpdateWriter(memory)
    head = HeadWriter(memory, updates, train=True)
    layers = _LayerWriter(memory, head, train=True)
    layers.forward()
    head.write()
    layers.backward(updates)
    updates.close()
    return memory


def _write_evaluation(spec: ModelSpec, plan: MemoryPlan) -> StepMemory:
    memory = StepMemory(spec, plan, "evaluate")
    head = HeadWriter(memory, UpdateWriter(memory), train=False)
    _LayerWriter(memory, head, train=False).forward()
    head.write()
    return memory


class _LayerWriter:
    """Writes the embedding's look-up and the decoder layers, forward and backward."""

    def __init__(self, memory: StepMemory, head: HeadWriter, *, train: bool) -> None:
        self.memory = memory
        self.spec, self.plan = memory.spec, memory.plan
        self._train = train
        self._offloaded = self.plan.offloaded if train else 0
        self._micro = range(self.plan.micro_batches)
        self._layout = [*memory.constants, *(["documents"] if self.plan.packed else [])]
        self._balance = [memory.balance, "targets"] if train and self.spec.balanced else []
        layers = len(self.spec.layers)
        # Positions of the layers that have a backward; those before them keep nothing for it.
        self._backward = range(self.spec.lowest_trained if train else layers, layers)
        self._keeping = self.plan.keeps(layers).intersection(self._backward)
        self._spilling = self.plan.spills(layers).intersection(self._backward)
        streamed = [u.name for u in self.spec.layers if not memory.resident(u.name)]
        again = [u.name for u in self.spec.layers[self._backward.start :] if u.name in streamed]
        visits = [*streamed, *head.visits, *reversed(again)]
        memory.visits = place_weights(visits, self.plan.window)

    def forward(self) -> None:
        """Look the embedding's rows up and run every layer; leaves the norm's input on the GPU."""
        self._stage_batch()
        for position, unit in enumerate(self.spec.layers):
            weights = [*self._weights(unit, "fwd"), *self._adapters(position, "fwd")]
            for m in self._micro:
                if position == 0:
                    self._look_up(unit.name, m)
                self._forward(position, unit, weights, m)

    def _forward(self, position: int, unit: UnitSpec, weights: list[str], m: int) -> None:
        memory = self.memory
        x = memory.activations.boundaries[unit.name, m]
        follower = (*self.spec.layers, self.spec.norm)[position + 1].name
        out = memory.activations.boundary(follower, m)
        kept = [memory.activations.keep(unit.name, m)] if position in self._keeping else []
        started = position > 0 or m > 0  # the first task of a step begins with zeros
        counted = self._balance if started else self._balance[1:]
        memory.task(
            f"fwd.{unit.name}.m{m}",
            TaskKind.COMPUTE,
            reads=[*weights, x, *self._layout, *counted],
            writes=[out, *kept, *self._balance[:1]],
            cost=Cost(
                products=self._products(unit),
                nbytes=forward_nbytes(self.spec, unit, self.plan),
            ),
            unit=unit.name,
            micro=m,
        )
        if position not in self._backward or position < self._offloaded:
            memory.activations.release(x)
        if position + 1 < self._offloaded and position + 1 in self._backward:
            memory.activations.offload_boundary(follower, m, out)
        if position in self._spilling:
            memory.activations.spill(unit.name, m)

    def _weights(self, unit: UnitSpec, purpose: str) -> list[str]:
        return self.memory.weights(unit.name, self.memory.chunks[unit.name], purpose)

    def _adapters(self, position: int, purpose: str) -> list[str]:
        """Buffers of a layer's adapters; those that are not resident take turns in two slots."""
        adapter = self.spec.adapters.get(self.spec.layers[position].name)
        if adapter is None:
            return []
        chunks = self.memory.chunks[adapter.name]
        slot = f"w.adapter.{position % 2}"
        return self.memory.weights(adapter.name, chunks, purpose, slot=slot)

    def _products(self, unit: UnitSpec) -> tuple[Product, ...]:
        return forward_products(self.spec, unit, self.plan.micro_rows, self.plan.seq_len)

    def _stage_batch(self) -> None:
        memory = self.memory
        inputs = {"targets": 8 * self.plan.tokens}
        inputs |= {"documents": memory.documents_nbytes} if self.plan.packed else {}
        if memory.resident("embed"):
            inputs |= {"ids": 8 * self.plan.tokens}
            trained = self._train and not self.spec.embed.frozen
            inputs |= {"index": memory.index_nbytes} if trained else {}
        staged = [
            memory.buffer(f"{name}_host", nbytes, Tier.PINNED, Role.INPUT)
            for name, nbytes in inputs.items()
        ]
        total = sum(inputs.values())
        memory.task("stage.batch", TaskKind.CPU, writes=staged, cost=Cost(nbytes=total))
        for (name, nbytes), host in zip(inputs.items(), staged, strict=True):
            target = memory.buffer(name, nbytes, Tier.GPU, Role.INPUT)
            memory.copy(f"h2d.{name}", TaskKind.H2D, host, target)

    def _look_up(self, first: str, m: int) -> None:
        """Embedding rows of a micro-batch: gathered by the CPU, or on the GPU if they are there."""
        memory = self.memory
        chunks, cost = memory.chunks["embed"], Cost(nbytes=2 * memory.activations.nbytes)
        x = memory.activations.boundary(first, m)
        rows = [memory.hi(c) for c in chunks]
        if memory.resident("embed"):
            reads = [*rows, "ids"]
            memory.task(
                f"gather.embed.m{m}",
                TaskKind.COMPUTE,
                op="gather_on_gpu",
                reads=reads,
                writes=[x],
                cost=cost,
                micro=m,
            )
            if self._offloaded and 0 in self._backward:
                memory.activations.offload_boundary(first, m, x)
            return
        host = memory.activations.host_boundary(first, m)
        reads = [*rows, *(s for c in chunks for s in memory.state(c))]  # FP32 compute needs both
        memory.task(
            f"gather.embed.m{m}", TaskKind.CPU, reads=reads, writes=[host], cost=cost, micro=m
        )
        memory.copy(f"h2d.x.{first}.m{m}.fwd", TaskKind.H2D, host, x)

    def backward(self, updates: UpdateWriter) -> None:
        """Differentiate each layer, last first; update each as its gradient lands."""
        memory = self.memory
        updates.early_rows()
        for position in reversed(self._backward):
            unit = self.spec.layers[position]
            weights = [*self._weights(unit, "bwd"), *self._adapters(position, "bwd")]
            trained = self.spec.adapters.get(unit.name, unit)
            accumulators = memory.gradients.accumulate(trained, "acc.0")
            for m in self._micro:
                self._differentiate(position, unit, weights, accumulators, m)
            if position == 0:
                updates.late_rows(unit.name)
            updates.finish_unit(trained, accumulators)
        for m in self._micro:
            memory.activations.release(memory.activations.boundaries["dx", m])

    def _differentiate(
        self, position: int, unit: UnitSpec, weights: list[str], accumulators: list[str], m: int
    ) -> None:
        activations = self.memory.activations
        if position < self._offloaded:
            activations.reload_boundary(unit.name, m)
        if position in self._spilling:
            activations.reload_kept(unit.name, m)
        x = activations.boundaries[unit.name, m]
        dx = activations.boundaries["dx", m]
        kept = [activations.kept[unit.name, m]] if position in self._keeping else []
        cost = Cost(
            products=backward_products(self.spec, unit, self.plan, kept=bool(kept)),
            nbytes=backward_nbytes(self.spec, unit, self.plan, kept=bool(kept)),
        )
        self.memory.task(
            f"bwd.{unit.name}.m{m}",
            TaskKind.COMPUTE,
            reads=[*weights, x, dx, *kept, *self._layout, *self._balance]
            + (accumulators if m else []),
            writes=[dx, *kept, *accumulators],
            cost=cost,
            unit=unit.name,
            micro=m,
        )
        for buffer in (x, *kept):
            activations.release(buffer)
