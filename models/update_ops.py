"""Bindings that finish gradients and update weights."""

from __future__ import annotations

import torch
from torch import Tensor

from slideformer.graph.step_gradients import CHECK_NBYTES
from slideformer.graph.tasks import Task
from slideformer.kernels.adamw import adamw_rows, adamw_update
from slideformer.models.bindings import Binding, ModelMemory, Operation, Views, finite, without_grad
from slideformer.models.context import StepContext
from slideformer.models.rates import Rates, rate_runs, segments


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
        }

    def finish(self, task: Task, views: Views) -> Operation:
        """Round chunks' gradients to the dtype they travel in and append their norms."""
        memory = self._memory
        parts: list[tuple[Tensor, Tensor, Tensor | None]] = []
        for read, written in zip(task.reads, task.writes, strict=True):
            target = views[written]
            if written.startswith("parked."):  # stays on the GPU, without a norm
                gradient, norm = target.view(memory.dtype), None
            else:
                numel = (target.numel() - CHECK_NBYTES) // memory.plan.compute.nbytes
                gradient, norm = memory.travelling(target, numel)
            size = views[read].numel() // gradient.numel()
            accumulator = views[read].view(torch.float32 if size == 4 else torch.bfloat16)
            parts.append((accumulator, gradient, norm))

        def run(_: StepContext) -> None:
            for accumulator, gradient, norm in parts:
                gradient.copy_(accumulator)
                if norm is not None:
                    torch.linalg.vector_norm(gradient, dtype=torch.float32, out=norm)

        return without_grad(run)

    def update(self, task: Task, views: Views) -> Operation:
        """AdamW on one chunk of a unit."""
        name, begin, end = str(task.args["unit"]), int(task.args["begin"]), int(task.args["end"])
        state = self._memory.chunk_state(task, views)
        runs = rate_runs(self._memory.spec.unit(name), begin, end)
        gradient, norm = self._memory.travelling(views[task.reads[0]], end - begin)
        square = views[task.writes[-1]].view(torch.float64)

        def run(context: StepContext) -> None:
            _, optimizer = context.training()
            square[0] = finite(float(norm)) ** 2
            adamw_update(
                state.hi,
                state.lo,
                state.m,
                state.v,
                gradient,
                segments(runs, optimizer),
                optimizer,
                self._threads,
            )

        return run

    def update_idle_rows(self, task: Task, views: Views) -> Operation:
        """AdamW on the embedding's rows in a chunk that the step does not use."""
        memory, hidden = self._memory, self._memory.spec.hidden
        begin, end = int(task.args["begin"]), int(task.args["end"])
        state = memory.states["embed"].part(begin, end)
        parked = memory.travelling(views[task.reads[0]], end - begin) if memory.spec.tied else None
        square = views[task.writes[-1]].view(torch.float64)
        rates = Rates.of(memory.spec.embed.params[0])
        nothing = torch.empty(0, dtype=torch.int64)
        no_rows = torch.empty(0, hidden, dtype=memory.dtype)

        def run(context: StepContext) -> None:
            used, optimizer = context.training()
            if parked is not None:
                finite(float(parked[1]))
            idle = used.within(begin // hidden, end // hidden).idle
            square[0] = adamw_rows(
                state.hi,
                state.lo,
                state.m,
                state.v,
                idle,
                torch.zeros(len(idle) + 1, dtype=torch.int64),
                nothing,
                no_rows,
                None if parked is None else parked[0],
                rates.applied(optimizer),
                self._threads,
            )

        return run

    def update_used_rows(self, task: Task, views: Views) -> Operation:
        """AdamW on the rows that the step uses, whose gradients are sums over their positions."""
        memory, hidden = self._memory, self._memory.spec.hidden
        unit = memory.spec.embed
        first = views[next(n for n in task.reads if n.startswith("dxh."))]
        size = memory.plan.tokens * hidden * memory.plan.compute.nbytes
        dx = first.as_strided((size,), (1,)).view(memory.dtype).view(-1, hidden)
        parts = self._parked_parts(task, views)
        rates = Rates.of(unit.params[0])
        square = views[task.writes[-1]].view(torch.float64)

        def run(context: StepContext) -> None:
            used, optimizer = context.training()
            total = 0.0
            for begin, end, parked in parts:
                state = memory.states[unit.name].part(begin, end)
                rows = used.within(begin // hidden, end // hidden)
                total += finite(
                    adamw_rows(
                        state.hi,
                        state.lo,
                        state.m,
                        state.v,
                        rows.rows,
                        rows.starts,
                        rows.order,
                        dx,
                        parked,
                        rates.applied(optimizer),
                        self._threads,
                    )
                )
            square[0] = total

        return run

    def _parked_parts(self, task: Task, views: Views) -> list[tuple[int, int, Tensor | None]]:
        """Element ranges of the embedding, each with the output side's gradient if it is tied."""
        memory = self._memory
        whole = memory.spec.vocab * memory.spec.hidden
        if not memory.spec.tied:
            return [(0, whole, None)]
        parts: list[tuple[int, int, Tensor | None]] = []
        begin = 0
        for name in (n for n in task.reads if n.startswith("parked.")):
            numel = (views[name].numel() - CHECK_NBYTES) // memory.plan.compute.nbytes
            gradient, _ = self._memory.travelling(views[name], numel)
            parts.append((begin, begin + numel, gradient))
            begin += numel
        assert begin == whole, "the parked chunks tile the matrix"
        return parts
