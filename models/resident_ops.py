"""Bindings that update units whose weights and optimizer state stay on the GPU.

They compute the same bits as the CPU updates of ``update_ops.py``. Without a GPU the tensors lie in
host memory and the CPU kernels do the work, so the same graphs run there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from slideformer.graph.tasks import Task
from slideformer.kernels.adamw import AdamW, Segment, adamw_rows
from slideformer.kernels.adamw8_gpu import adamw8_update_gpu
from slideformer.kernels.adamw_gpu import adamw_rows_gpu, adamw_update_gpu, row_squares_gpu
from slideformer.kernels.row_squares import row_squares
from slideformer.kernels.squares import sum_of_squares
from slideformer.models.clip_ops import optimizer_of
from slideformer.models.context import PackedRows, StepContext, unpack_rows
from slideformer.models.model_memory import (
    Binding,
    ModelMemory,
    Operation,
    Views,
    whole,
    without_grad,
)
from slideformer.models.rates import Rates, rate_runs, segments
from slideformer.models.state import UnitState
from slideformer.models.update_ops import update_on_cpu


class _Rows(NamedTuple):
    """Which rows to update and where their gradients are; only the first ``valid`` count."""

    valid: Tensor
    rows: Tensor
    starts: Tensor
    order: Tensor
    dx: Tensor

    def on_cpu(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What counts, for the kernels of the CPU, which take no ``valid``."""
        count = int(self.valid)
        starts = self.starts[: count + 1]
        return self.rows[:count], starts, self.order[: int(starts[-1])], self.dx


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
            "park": self.park,
            "square_idle_rows_on_gpu": self.square_idle_rows,
            "square_used_rows_on_gpu": self.square_used_rows,
            "download_squares": self.download_squares,
        }

    def park(self, task: Task, views: Views) -> Operation:
        """Round a unit's gradient as one that travels, keep it, and sum up its squares."""
        gradient = whole(views, task.writes, "parked.").view(self._memory.dtype)
        accumulator = self._accumulator(task, views, len(gradient))
        square = _square(task, views)

        def run(_: StepContext) -> None:
            gradient.copy_(accumulator)
            sum_of_squares(gradient, square)

        return without_grad(run)

    def update(self, task: Task, views: Views) -> Operation:
        """Update a unit; a gradient that is not finite leaves it as it is."""
        memory = self._memory
        name, begin, end = str(task.args["unit"]), int(task.args["begin"]), int(task.args["end"])
        state = memory.states[name].part(begin, end)
        runs = rate_runs(memory.spec.unit(name), begin, end)
        parked = any(n.startswith("parked.") for n in task.reads)
        if parked:
            kept = whole(views, task.reads, "parked.").view(memory.dtype)
        else:
            kept = self._accumulator(task, views, end - begin)
        square = _square(task, views)

        def run(context: StepContext) -> None:
            optimizer = optimizer_of(task, context)
            if optimizer is None:
                return
            gradient = kept
            if not parked:
                gradient = kept.to(memory.dtype)  # rounded as a gradient that travels
                sum_of_squares(gradient, square)
            self._update(state, gradient, square, segments(runs, optimizer), optimizer)

        return without_grad(run)

    def _accumulator(self, task: Task, views: Views, numel: int) -> Tensor:
        """A unit's accumulator, of FP32 or of the compute dtype."""
        names = [name for name in task.reads if name.startswith("acc.")]
        flat = whole(views, names, "acc.")
        return flat.view(self._memory.dtype if flat.numel() == 2 * numel else torch.float32)

    def _update(
        self,
        state: UnitState,
        gradient: Tensor,
        square: Tensor,
        segments: list[Segment],
        optimizer: AdamW,
    ) -> None:
        tensors = (state.hi, state.lo, state.m, state.v)
        if gradient.is_cuda and len(state.scales):
            adamw8_update_gpu(*tensors, state.scales, gradient, square, segments, optimizer)
        elif gradient.is_cuda:
            adamw_update_gpu(*tensors, gradient, square, segments, optimizer)
        elif torch.isfinite(square):
            update_on_cpu(state, gradient, segments, optimizer, self._threads)

    def update_idle_rows(self, task: Task, views: Views) -> Operation:
        """Update the embedding's rows that the step does not use."""
        return self._update_rows(task, views, self._idle(views))

    def update_used_rows(self, task: Task, views: Views) -> Operation:
        """Update the rows that the step uses, whose gradients are sums over their positions."""
        return self._update_rows(task, views, self._used(task, views))

    def square_idle_rows(self, task: Task, views: Views) -> Operation:
        """Squares of the gradients of the idle rows."""
        return self._square_rows(task, views, self._idle(views))

    def square_used_rows(self, task: Task, views: Views) -> Operation:
        """Squares of the gradients of the used rows."""
        return self._square_rows(task, views, self._used(task, views))

    def _idle(self, views: Views) -> _Rows:
        packed = self._packed(views)
        device = packed.idle.device
        starts = torch.zeros(len(packed.idle) + 1, dtype=torch.int64, device=device)
        nothing = torch.empty(0, self._memory.spec.hidden, dtype=self._memory.dtype, device=device)
        return _Rows(packed.idle_count, packed.idle, starts, packed.order[:0], nothing)

    def _used(self, task: Task, views: Views) -> _Rows:
        packed, memory = self._packed(views), self._memory
        dx = whole(views, task.reads, "x.dx.").view(memory.dtype).view(-1, memory.spec.hidden)
        return _Rows(packed.used_count, packed.rows, packed.starts, packed.order, dx)

    def _parked(self, task: Task, views: Views) -> Tensor | None:
        """The output side's gradient, if the embedding is tied."""
        if not self._memory.spec.tied:
            return None
        return whole(views, task.reads, "parked.").view(self._memory.dtype)

    def _update_rows(self, task: Task, views: Views, rows: _Rows) -> Operation:
        memory, parked = self._memory, self._parked(task, views)
        state = memory.states["embed"].part(0, memory.spec.vocab * memory.spec.hidden)
        tensors = (state.hi, state.lo, state.m, state.v)
        rates = Rates.of(memory.spec.embed.params[0])
        result = _square(task, views) if task.writes[-1].startswith("square.") else None

        def run(context: StepContext) -> None:
            asked = optimizer_of(task, context)
            if asked is None:
                return
            optimizer = rates.applied(asked)
            if rows.dx.is_cuda:
                squares = torch.empty(len(rows.rows), dtype=torch.float64, device=rows.dx.device)
                adamw_rows_gpu(*tensors, *rows, parked, squares, optimizer)
                if result is not None:
                    torch.sum(squares, 0, out=result)
                return
            total = adamw_rows(*tensors, *rows.on_cpu(), parked, optimizer, self._threads)
            if result is not None:
                result.fill_(total)

        return without_grad(run)

    def _square_rows(self, task: Task, views: Views, rows: _Rows) -> Operation:
        parked, result = self._parked(task, views), _square(task, views)

        def run(_: StepContext) -> None:
            if rows.dx.is_cuda:
                squares = torch.empty(len(rows.rows), dtype=torch.float64, device=rows.dx.device)
                row_squares_gpu(*rows, parked, squares)
            else:
                table = rows.on_cpu()
                squares = torch.empty(len(table[0]), dtype=torch.float64)
                row_squares(self._memory.spec.vocab, *table, parked, squares, self._threads)
            torch.sum(squares, 0, out=result)

        return without_grad(run)

    def _packed(self, views: Views) -> PackedRows:
        return unpack_rows(views["index"].view(torch.int64), self._memory.plan.tokens)

    def download_squares(self, task: Task, views: Views) -> Operation:
        """Bring the sums of squares of all resident chunks down."""
        squares, host = whole(views, task.reads, "square."), views[task.writes[0]]
        return lambda _: host.copy_(squares, non_blocking=True)


def _square(task: Task, views: Views) -> Tensor:
    """The sum of squares (FP64 scalar) of a task's gradient, which it writes or reads."""
    name = next(n for n in (*task.writes, *task.reads) if n.startswith("square."))
    return views[name].view(torch.float64)[0]
