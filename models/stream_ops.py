"""Bindings of copies, inputs, the embedding's look-up and the decoder layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from slideformer.graph.model import UnitSpec
from slideformer.graph.plan import Compute
from slideformer.graph.tasks import Task
from slideformer.kernels.split import join_master
from slideformer.models import layer
from slideformer.models.balance import balance_of
from slideformer.models.context import StepContext
from slideformer.models.layer_memory import Kept, kept_views
from slideformer.models.layouts import Layout, layer_layout, step_documents
from slideformer.models.low_rank import AdaptedOperands
from slideformer.models.model_memory import Binding, ModelMemory, Operation, Views, without_grad
from slideformer.models.operands import (
    never_written,
    operands,
    trained_operands,
    written_in_vain,
)


class StreamOps:
    """Copies, inputs and layers."""

    def __init__(self, memory: ModelMemory) -> None:
        self._memory = memory

    def table(self) -> dict[str, Binding]:
        """Op name → binding."""
        return {
            "copy": self.copy,
            "stage": self.stage,
            "gather": self.gather,
            "gather_on_gpu": self.gather_on_gpu,
            "upload_halves": self.upload_halves,
            "join": self.join,
            "fwd": self.forward,
            "bwd": self.backward,
            "unstage": self.unstage,
        }

    def copy(self, task: Task, views: Views) -> Operation:
        """Copy a buffer, without what fills pages, in stream order where the device has streams."""
        source, target = views[task.reads[0]], views[task.writes[0]]
        nbytes = min(len(source), len(target))
        source, target = source[:nbytes], target[:nbytes]
        return lambda _: target.copy_(source, non_blocking=True)

    def stage(self, task: Task, views: Views) -> Operation:
        """Put a step's targets, and what a resident embedding needs, into pinned memory."""
        memory, packed = self._memory, "documents_host"
        tokens = memory.plan.tokens
        staged = {name: views[name].view(torch.int64) for name in task.writes if name != packed}
        documents = step_documents(memory, views[packed]) if packed in task.writes else None

        def run(context: StepContext) -> None:
            staged["targets_host"].copy_(context.targets)
            if "ids_host" in staged:
                staged["ids_host"].copy_(context.input_ids)
            if "index_host" in staged:
                staged["index_host"].copy_(context.training()[0].packed(tokens))
            if documents is not None:
                context.packed().write(documents)

        return run

    def gather(self, task: Task, views: Views) -> Operation:
        """Look up a micro-batch's embedding rows."""
        memory = self._memory
        state = memory.states["embed"]
        width = memory.spec.hidden
        hi = state.hi[: memory.spec.vocab * width].view(-1, width)
        lo = state.lo[: memory.spec.vocab * width].view(-1, width)
        rows = memory.tokens(int(task.args["micro"]))
        out = views[task.writes[0]].view(memory.dtype).view(-1, width)

        def run_bf16(context: StepContext) -> None:
            torch.index_select(hi, 0, context.input_ids[rows], out=out.view(torch.int16))
            memory.scale_embedding_(out)

        def run_fp32(context: StepContext) -> None:
            ids = context.input_ids[rows]
            join_master(hi[ids], lo[ids], out)
            memory.scale_embedding_(out)

        return run_bf16 if memory.plan.compute is Compute.BF16 else run_fp32

    def gather_on_gpu(self, task: Task, views: Views) -> Operation:
        """Look up a micro-batch's rows of a resident embedding."""
        memory = self._memory
        matrix = memory.weights(views, task.reads, "embed").view(-1, memory.spec.hidden)
        ids = views["ids"].view(torch.int64)[memory.tokens(int(task.args["micro"]))]
        out = memory.boundary(views[task.writes[0]]).view(-1, memory.spec.hidden)

        def run(_: StepContext) -> None:
            torch.index_select(matrix, 0, ids, out=out)
            memory.scale_embedding_(out)

        return without_grad(run)

    def upload_halves(self, task: Task, views: Views) -> Operation:
        """Bring both halves of a chunk's master up, for FP32 compute."""
        state = self._memory.states[str(task.args["unit"])]
        part = slice(int(task.args["begin"]), int(task.args["end"]))
        hi, lo = views[task.writes[0]].view(torch.int16).chunk(2)

        def run(_: StepContext) -> None:
            hi.copy_(state.hi[part], non_blocking=True)
            lo.copy_(state.lo[part], non_blocking=True)

        return run

    def join(self, task: Task, views: Views) -> Operation:
        """Join the halves to FP32 weights on the GPU."""
        hi, lo = views[task.reads[0]].view(torch.int16).chunk(2)
        weight = views[task.writes[0]].view(torch.float32)
        return without_grad(lambda _: join_master(hi, lo, weight))

    def forward(self, task: Task, views: Views) -> Operation:
        """One layer forward on one micro-batch."""
        unit, weights, layout = self._layer(task, views)
        cfg = self._memory.decoder
        x = self._memory.boundary(views[_only(task.reads, f"x.{unit.name}.")])
        out = self._memory.boundary(views[task.writes[0]])
        kept, tile = self._kept(task, views), self._memory.plan.mlp_tile
        balance = balance_of(self._memory, views, int(task.args["micro"]))
        first = "balance" in task.writes and "balance" not in task.reads

        def run(context: StepContext) -> None:
            rope, mask = layout(context)
            if first:
                views["balance"].zero_()
            layer.forward(
                x,
                weights,
                cfg,
                rope,
                mask=mask,
                out=out,
                kept=kept,
                tile=tile,
                balance=balance(),
            )

        return without_grad(run)

    def backward(self, task: Task, views: Views) -> Operation:
        """One layer backward on one micro-batch; what it did not keep is computed again."""
        memory = self._memory
        unit, weights, layout = self._layer(task, views)
        cfg, accumulate = memory.decoder, int(task.args["micro"]) > 0
        x = memory.boundary(views[_only(task.reads, f"x.{unit.name}.")])
        dx = memory.boundary(views[_only(task.reads, "x.dx.")])
        kept, tile = self._kept(task, views), self._memory.plan.mlp_tile
        gradients: dict[str, Tensor] = {}
        gaps: list[Tensor] = []
        unwanted: list[Tensor] = []
        trained = memory.spec.adapters.get(unit.name, unit)
        if not trained.frozen:
            size = memory.plan.layer_accumulator
            flat = memory.accumulators(views, task.writes, trained.name, size)
            gradients, unwanted = trained_operands(flat, trained), written_in_vain(flat, trained)
            # Whatever used the slot before may have left something where nothing is written; it
            # would get into the norm and, by the update, into the padding of the master.
            gaps = [] if accumulate else never_written(flat, trained)
        first = unit is memory.spec.layers[0]
        balance = balance_of(memory, views, int(task.args["micro"]))

        def run(context: StepContext) -> None:
            for gap in gaps:
                gap.zero_()
            rope, mask = layout(context)
            layer.backward(
                x,
                dx,
                weights,
                gradients,
                cfg,
                rope,
                accumulate=accumulate,
                mask=mask,
                kept=kept,
                tile=tile,
                balance=balance(),
            )
            for gradient in unwanted:
                gradient.zero_()
            if first:  # what leaves it is the gradient of what the embedding looked up
                memory.scale_embedding_(dx)

        return without_grad(run)

    def _kept(self, task: Task, views: Views) -> Kept | None:
        """What is kept from forward to backward, if anything."""
        names = [name for name in task.writes if name.startswith("kept.")]
        if not names:
            return None
        memory = self._memory
        plan = memory.plan
        return kept_views(
            views[names[0]], memory.decoder, plan.micro_rows, plan.seq_len, memory.dtype
        )

    def _layer(self, task: Task, views: Views) -> tuple[UnitSpec, dict[str, Tensor], Layout]:
        memory = self._memory
        unit = memory.spec.unit(str(task.args["unit"]))
        weights = operands(memory.weights(views, task.reads, unit.name), unit)
        adapter, lora = memory.spec.adapters.get(unit.name), memory.spec.lora
        if adapter is not None and lora is not None:
            low_rank = operands(memory.weights(views, task.reads, adapter.name), adapter)
            weights = AdaptedOperands(weights, low_rank, unit, lora)
        return unit, weights, layer_layout(memory, task, views, unit)

    def unstage(self, task: Task, views: Views) -> Operation:
        """Put a chunk's halves of the master, read from NVMe, beside those of its unit."""
        targets = [views[name] for name in task.writes]
        sources = [views[name] for name in task.reads]

        def run(_: object) -> None:
            for source, target in zip(sources, targets, strict=True):
                target.copy_(source[: len(target)])

        return run


def _only(names: Sequence[str], prefix: str) -> str:
    found = [name for name in names if name.startswith(prefix)]
    assert len(found) == 1, f"expected one buffer {prefix}* among {names}"
    return found[0]
