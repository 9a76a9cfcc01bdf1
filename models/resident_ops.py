"""Bindings that update units whose weights and optimizer state stay on the GPU.

They compute the same bits as the CPU updates of ``update_ops.py``. Without a GPU the tensors lie in
host memory and the CPU kernels do the work, so the same graphs run there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from slideformer.graph.tasks import Task
from slideformer.kernels.adamw import AdamW, Segment, adamw_rows, adamw_update
from slideformer.kernels.adamw_gpu import adamw_rows_gpu, adamw_update_gpu
from slideformer.models.bindings import Binding, ModelMemory, Operation, Views, whole, without_grad
from slideformer.models.context import PackedRows, StepContext, unpack_rows
from slideformer.models.rates import Rates, rate_runs, segments
from slideformer.models.state import UnitState


class _Rows(NamedTuple):
    """Which rows to update and where their gradients are; only the first ``valid`` count."""

    valid: Tensor
    rows: Tensor
    starts: Tensor
    order: Tensor


class ResidentOps:
    """Updates on the compute lane; ``threads`` are used where there is no GPU."""

    def __init__(self, memory: ModelMemory, threads: int) -> None:
        self._memory = memory
        self._threads = threads

    def table(self) -> dict[str, Binding]:
        """Op name → binding."""
        return {
            "update_on_gpu": self.update,
            "update_idle_rows_on_gpu": self.update_idle_rows,
            "update_used_rows_on_gpu": self.update_used_rows,
            "download_norms": self.download_norms,
        }

    def update(self, task: Task, views: Views) -> Operation:
        """AdamW on a unit; a gradient that is not finite leaves it as it is."""
        memory = self._memory
        name, begin, end = str(task.args["unit"]), int(task.args["begin"]), int(task.args["end"])
        state = memory.states[name].part(begin, end)
        runs = rate_runs(memory.spec.unit(name), begin, end)
        flat = whole(views, task.reads, f"acc.{name}.")
        accumulator = flat.view(
            memory.dtype if flat.numel() == 2 * (end - begin) else torch.float32
        )
        norm = views[task.writes[-1]].view(torch.float32)[0]

        def run(context: StepContext) -> None:
            _, optimizer = context.training()
            gradient = accumulator.to(memory.dtype)  # rounded as a gradient that travels
            torch.linalg.vector_norm(gradient, dtype=torch.float32, out=norm)
            self._update(state, gradient, norm, segments(runs, optimizer), optimizer)

        return without_grad(run)

    def _update(
        self,
        state: UnitState,
        gradient: Tensor,
        norm: Tensor,
        segments: list[Segment],
        optimizer: AdamW,
    ) -> None:
        tensors = (state.hi, state.lo, state.m, state.v, gradient)
        if gradient.is_cuda:
            adamw_update_gpu(*tensors, norm, segments, optimizer)
        elif torch.isfinite(norm):
            adamw_update(*tensors, segments, optimizer, self._threads)

    def update_idle_rows(self, task: Task, views: Views) -> Operation:
        """AdamW on the embedding's rows that the step does not use."""
        packed = self._packed(views)
        device = packed.idle.device
        starts = torch.zeros(len(packed.idle) + 1, dtype=torch.int64, device=device)
        nothing = torch.empty(0, self._memory.spec.hidden, dtype=self._memory.dtype, device=device)
        rows = _Rows(packed.idle_count, packed.idle, starts, packed.order[:0])
        return self._update_rows(task, views, rows, nothing)

    def update_used_rows(self, task: Task, views: Views) -> Operation:
        """AdamW on the rows that the step uses, whose gradients are sums over their positions."""
        packed, memory = self._packed(views), self._memory
        dx = whole(views, task.reads, "x.dx.").view(memory.dtype).view(-1, memory.spec.hidden)
        rows = _Rows(packed.used_count, packed.rows, packed.starts, packed.order)
        return self._update_rows(task, views, rows, dx)

    def _update_rows(self, task: Task, views: Views, rows: _Rows, dx: Tensor) -> Operation:
        memory = self._memory
        state = memory.states["embed"].part(0, memory.spec.vocab * memory.spec.hidden)
        tensors = (state.hi, state.lo, state.m, state.v)
        rates = Rates.of(memory.spec.embed.params[0])
        parked = None
        if memory.spec.tied:
            parked = whole(views, task.reads, "parked.").view(memory.dtype)
        reported = views[task.writes[-1]].view(torch.float32)[0]

        def run(context: StepContext) -> None:
            optimizer = rates.applied(context.training()[1])
            if dx.is_cuda:
                squares = torch.empty(len(rows.rows), dtype=torch.float32, device=dx.device)
                adamw_rows_gpu(
                    *tensors,
                    rows.valid,
                    rows.rows,
                    rows.starts,
                    rows.order,
                    dx,
                    parked,
                    squares,
                    optimizer,
                )
                torch.sqrt(squares.sum(), out=reported)
                return
            count = int(rows.valid)
            starts = rows.starts[: count + 1]
            order = rows.order[: int(starts[-1])]
            total = adamw_rows(
                *tensors, rows.rows[:count], starts, order, dx, parked, optimizer, self._threads
            )
            reported.fill_(total**0.5)

        return without_grad(run)

    def _packed(self, views: Views) -> PackedRows:
        return unpack_rows(views["index"].view(torch.int64), self._memory.plan.tokens)

    def download_norms(self, task: Task, views: Views) -> Operation:
        """Bring the norms of all resident chunks down."""
        norms, host = whole(views, task.reads, "norm."), views[task.writes[0]]
        return lambda _: host.copy_(norms, non_blocking=True)
