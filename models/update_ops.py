"""Bindings that finish gradients and update weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slideformer.graph.tasks import Task
from slideformer.kernels.adamw import AdamW, Segment, adamw_rows, adamw_update
from slideformer.kernels.adamw8 import adamw8_update
from slideformer.kernels.row_squares import row_squares
from slideformer.kernels.squares import sum_of_squares
from slideformer.models.clip_ops import optimizer_of
from slideformer.models.context import StepContext, UsedRows
from slideformer.models.model_memory import (
    Binding,
    ModelMemory,
    Operation,
    Views,
    finite,
    without_grad,
)
from slideformer.models.rates import Rates, rate_runs, segments
from slideformer.models.state import UnitState


@dataclass(frozen=True)
class _Rows:
    """Rows of the embedding, idle or used, and where their gradients are.

    ``parts`` are element ranges, each with the output side's gradient if it is tied; ``dx`` are the
    look-up's rows.
    """

    parts: list[tuple[int, int, Tensor | None]]
    dx: Tensor
    idle: bool

    def within(self, context: StepContext, start: int, stop: int) -> UsedRows:
        """Those of the step in ``[start, stop)``, counted from ``start``."""
        found = context.training()[0].within(start, stop)
        if not self.idle:
            return found
        none = torch.zeros(len(found.idle) + 1, dtype=torch.int64)
        return UsedRows(found.idle, none, none[:0], none[:0])


class UpdateOps:
    """Gradient chunks become weights; runs on ``threads`` threads of the CPU."""

    def __init__(self, memory: ModelMemory, threads: int) -> None:
        self._memory = memory
        self._threads = threads

    def table(self) -> dict[str, Binding]:
        """Op name → binding."""
        return {
            "finish": self.finish,
            "update": self.update,
            "update_idle_rows": self.update_idle_rows,
            "update_used_rows": self.update_used_rows,
            "square_idle_rows": self.square_idle_rows,
            "square_used_rows": self.square_used_rows,
        }

    def finish(self, task: Task, views: Views) -> Operation:
        """Round chunks' gradients to the dtype they travel in and append their squares."""
        memory = self._memory
        parts: list[tuple[Tensor, Tensor, Tensor | None]] = []
        for read, written in zip(task.reads, task.writes, strict=True):
            target, square = views[written], None
            if written.startswith("parked."):  # stays on the GPU, without its squares
                gradient = target.view(memory.dtype)
            else:
                gradient, square = memory.travelling(target)
            size = views[read].numel() // gradient.numel()
            accumulator = views[read].view(torch.float32 if size == 4 else torch.bfloat16)
            parts.append((accumulator, gradient, square))

        def run(_: StepContext) -> None:
            for accumulator, gradient, square in parts:
                gradient.copy_(accumulator)
                if square is not None:
                    sum_of_squares(gradient, square)

        return without_grad(run)

    def update(self, task: Task, views: Views) -> Operation:
        """Update one chunk of a unit."""
        name, begin, end = str(task.args["unit"]), int(task.args["begin"]), int(task.args["end"])
        state = self._memory.chunk_state(task, views)
        runs = rate_runs(self._memory.spec.unit(name), begin, end)
        gradient, square = self._memory.travelling(views[task.reads[0]])
        result = _result(task, views)

        def run(context: StepContext) -> None:
            optimizer = optimizer_of(task, context)
            if optimizer is None:
                return
            if result is not None:
                result.fill_(finite(float(square)))
            update_on_cpu(state, gradient, segments(runs, optimizer), optimizer, self._threads)

        return run

    def update_idle_rows(self, task: Task, views: Views) -> Operation:
        """Update the embedding's rows in a chunk that the step does not use."""
        return self._update_rows(task, views, self._idle(task, views))

    def update_used_rows(self, task: Task, views: Views) -> Operation:
        """Update the rows that the step uses, whose gradients are sums over their positions."""
        return self._update_rows(task, views, self._used(task, views))

    def square_idle_rows(self, task: Task, views: Views) -> Operation:
        """Squares of the gradients of a chunk's idle rows."""
        return self._square_rows(task, views, self._idle(task, views))

    def square_used_rows(self, task: Task, views: Views) -> Operation:
        """Squares of the gradients of the used rows."""
        return self._square_rows(task, views, self._used(task, views))

    def _update_rows(self, task: Task, views: Views, rows: _Rows) -> Operation:
        memory, hidden = self._memory, self._memory.spec.hidden
        result, rates = _result(task, views), Rates.of(memory.spec.embed.params[0])

        def run(context: StepContext) -> None:
            asked = optimizer_of(task, context)
            if asked is None:
                return
            optimizer, total = rates.applied(asked), 0.0
            for begin, end, parked in rows.parts:
                state = memory.states["embed"].part(begin, end)
                listed = rows.within(context, begin // hidden, end // hidden)
                total += adamw_rows(
                    *(state.hi, state.lo, state.m, state.v),
                    *(listed.rows, listed.starts, listed.order),
                    rows.dx,
                    parked,
                    optimizer,
                    self._threads,
                )
                finite(total)
            if result is not None:
                result.fill_(total)

        return run

    def _square_rows(self, task: Task, views: Views, rows: _Rows) -> Operation:
        hidden = self._memory.spec.hidden
        result = _result(task, views)
        assert result is not None

        def run(context: StepContext) -> None:
            total = 0.0
            for begin, end, parked in rows.parts:
                listed = rows.within(context, begin // hidden, end // hidden)
                squares = torch.empty(len(listed.rows), dtype=torch.float64)
                row_squares(
                    (end - begin) // hidden,
                    *(listed.rows, listed.starts, listed.order),
                    rows.dx,
                    parked,
                    squares,
                    self._threads,
                )
                total += float(squares.sum())
            result.fill_(total)

        return run

    def _idle(self, task: Task, views: Views) -> _Rows:
        memory, hidden = self._memory, self._memory.spec.hidden
        begin, end = int(task.args["begin"]), int(task.args["end"])
        parked = memory.travelling(views[task.reads[0]])[0] if memory.spec.tied else None
        nothing = torch.empty(0, hidden, dtype=memory.dtype)
        return _Rows([(begin, end, parked)], nothing, idle=True)

    def _used(self, task: Task, views: Views) -> _Rows:
        memory, hidden = self._memory, self._memory.spec.hidden
        first = views[next(n for n in task.reads if n.startswith("dxh."))]
        size = memory.plan.tokens * hidden * memory.plan.compute.nbytes
        dx = first.as_strided((size,), (1,)).view(memory.dtype).view(-1, hidden)
        return _Rows(self._parked_parts(task, views), dx, idle=False)

    def _parked_parts(self, task: Task, views: Views) -> list[tuple[int, int, Tensor | None]]:
        """Element ranges of the embedding, each with the output side's gradient if it is tied."""
        memory = self._memory
        whole = memory.spec.vocab * memory.spec.hidden
        if not memory.spec.tied:
            return [(0, whole, None)]
        parts: list[tuple[int, int, Tensor | None]] = []
        begin = 0
        for name in (n for n in task.reads if n.startswith("parked.")):
            gradient, _ = memory.travelling(views[name])
            parts.append((begin, begin + len(gradient), gradient))
            begin += len(gradient)
        assert begin == whole, "the parked chunks tile the matrix"
        return parts


def update_on_cpu(
    state: UnitState, gradient: Tensor, segments: list[Segment], optimizer: AdamW, threads: int
) -> None:
    """Update what lies in host memory, with moments of whichever kind it has."""
    master, moments = (state.hi, state.lo), (state.m, state.v)
    if len(state.scales):
        adamw8_update(*master, *moments, state.scales, gradient, segments, optimizer, threads)
    else:
        adamw_update(*master, *moments, gradient, segments, optimizer, threads)


def _result(task: Task, views: Views) -> Tensor | None:
    """Where a task writes its sum of squares (FP64 scalar), if it does."""
    names = [name for name in task.writes if name.startswith("square.")]
    return views[names[0]].view(torch.float64)[0] if names else None
