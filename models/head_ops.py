"""Bindings of the final norm, the output matrix and the loss (arithmetic in ``head.py``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor

from slideformer.graph.chunks import vocab_chunks
from slideformer.graph.tasks import Task
from slideformer.kernels.cross_entropy import LossForm
from slideformer.kernels.rms_norm import rms_norm, rms_norm_backward
from slideformer.models.balance import balance_loss
from slideformer.models.context import StepContext
from slideformer.models.gradients import store_
from slideformer.models.head import (
    HeadStats,
    head_grad,
    head_loss,
    head_loss_and_grad,
    head_stats,
)
from slideformer.models.model_memory import (
    Binding,
    ModelMemory,
    Operation,
    Views,
    finite,
    without_grad,
)


class _Loss(TypedDict):
    """How every sweep makes its logits, and the loss from them."""

    tile: int
    form: LossForm


class HeadOps:
    """Loss and gradients, in one sweep over the output matrix or in two."""

    def __init__(self, memory: ModelMemory, label_smoothing: float, z_loss: float) -> None:
        """Training has these beside cross-entropy (`LossForm`), evaluation has not."""
        self._memory = memory
        tile, plain = memory.plan.head_tile, LossForm(softcap=memory.decoder.final_softcap)
        form = plain._replace(
            smoothing=label_smoothing or None, z_loss=z_loss or None, vocabulary=memory.spec.vocab
        )
        self._train, self._evaluate = _Loss(tile=tile, form=form), _Loss(tile=tile, form=plain)
        self._starts = [v.start for v in vocab_chunks(memory.spec, memory.plan.vocab_chunks)]

    def table(self) -> dict[str, Binding]:
        """Op name → binding."""
        return {
            "loss": self.loss,
            "evaluate_loss": self.evaluate_loss,
            "stats": lambda task, views: self.stats(task, views, self._train),
            "evaluate_stats": lambda task, views: self.stats(task, views, self._evaluate),
            "grad": self.grad,
            "norm_backward": self.norm_backward,
            "report": self.report,
            "balance_loss": self.balance_loss,
        }

    def loss(self, task: Task, views: Views) -> Operation:
        """Loss of one micro-batch, gradients of the whole matrix, the norm and its input."""
        parts = _Parts(task, views, self._memory)
        matrix, gradient, dx = parts.matrix(), parts.matrix_gradient(), parts.input_gradient()

        def run(context: StepContext) -> None:
            if parts.first:
                parts.loss.zero_()
            normed, rstd = parts.norm_forward()
            head_loss_and_grad(
                normed,
                matrix,
                parts.targets,
                context.scale,
                parts.loss,
                dx,
                gradient,
                accumulate_dw=not parts.first,
                **self._train,
            )
            parts.finish_norm(dx, rstd, dx)

        return without_grad(run)

    def evaluate_loss(self, task: Task, views: Views) -> Operation:
        """Loss of one micro-batch, nothing else."""
        parts = _Parts(task, views, self._memory)
        matrix = parts.matrix()

        def run(context: StepContext) -> None:
            if parts.first:
                parts.loss.zero_()
            stats = HeadStats.start(len(parts.x), parts.x.device)
            head_stats(parts.normed(), matrix, parts.targets, 0, stats, **self._evaluate)
            head_loss(stats, parts.targets, context.scale, parts.loss)

        return without_grad(run)

    def stats(self, task: Task, views: Views, loss: _Loss) -> Operation:
        """First sweep: fold one vocabulary chunk into the softmax denominators."""
        parts = _Parts(task, views, self._memory)
        matrix = parts.matrix()
        vocab = int(task.args["vocab"])
        last = "loss" in task.writes
        stats = HeadStats(*views[f"softmax.m{task.args['micro']}"].view(torch.float32).chunk(3))

        def run(context: StepContext) -> None:
            if vocab == 0:
                for held, start in zip(
                    stats, HeadStats.start(len(parts.x), parts.x.device), strict=True
                ):
                    held.copy_(start)
            head_stats(
                parts.normed(),
                matrix,
                parts.targets,
                self._starts[vocab],
                stats,
                **loss,
            )
            if last:
                if parts.first:
                    parts.loss.zero_()
                lse = head_loss(stats, parts.targets, context.scale, parts.loss, loss["form"])
                stats.running_max.copy_(lse)  # the second sweep needs nothing else

        return without_grad(run)

    def grad(self, task: Task, views: Views) -> Operation:
        """Second sweep: gradients through one vocabulary chunk."""
        parts = _Parts(task, views, self._memory)
        matrix, gradient = parts.matrix(), parts.matrix_gradient()
        vocab, micro = int(task.args["vocab"]), task.args["micro"]
        lse = views[f"softmax.m{micro}"].view(torch.float32).chunk(3)[0]
        dxn = views[f"dxn.m{micro}"].view(torch.float32).view(len(parts.x), -1)
        accumulate_dxn = f"dxn.m{micro}" in task.reads

        def run(context: StepContext) -> None:
            head_grad(
                parts.normed(),
                matrix,
                parts.targets,
                self._starts[vocab],
                lse,
                context.scale,
                dxn,
                gradient,
                accumulate_dxn=accumulate_dxn,
                accumulate_dw=not parts.first,
                **self._train,
            )

        return without_grad(run)

    def norm_backward(self, task: Task, views: Views) -> Operation:
        """After the second sweep: back through the final norm."""
        parts = _Parts(task, views, self._memory)
        dxn = views[f"dxn.m{task.args['micro']}"].view(torch.float32).view(len(parts.x), -1)
        dx = parts.input_gradient()

        def run(_: StepContext) -> None:
            rstd = parts.norm_forward()[1]
            dx.copy_(dxn)
            parts.finish_norm(dx, rstd, dx)

        return without_grad(run)

    def balance_loss(self, _: Task, views: Views) -> Operation:
        """Add the loss that balances the experts' load."""
        experts = self._memory.decoder.experts
        assert experts is not None
        assert experts.balance is not None
        coefficient = experts.balance
        statistics, loss = (views[name].view(torch.float32) for name in ("balance", "loss"))
        return without_grad(lambda _: loss.add_(balance_loss(statistics, coefficient)))

    def report(self, task: Task, views: Views) -> Operation:
        """Hand the loss, or the norm of all gradients, to whoever waits for it."""
        if task.name == "report.loss":
            loss = views[task.reads[0]].view(torch.float32)

            def run_loss(context: StepContext) -> None:
                context.results.loss.set_result(float(loss))

            return run_loss
        squares = [views[n].view(torch.float64) for n in task.reads if n != "squares_host"]
        on_gpu = [views[n].view(torch.float64) for n in task.reads if n == "squares_host"]
        chunks = str(task.args["resident"]).split(",")

        def run(context: StepContext) -> None:
            for each in on_gpu:
                for chunk, value in zip(chunks, each.tolist(), strict=True):
                    finite(value, f"update.{chunk}: ")
            total = float(torch.cat([*squares, *on_gpu]).sum())
            context.results.gradient_norm.set_result(finite(total) ** 0.5)

        return run


class _Parts:
    """The typed views that the head's tasks share."""

    def __init__(self, task: Task, views: Views, memory: ModelMemory) -> None:
        self._task, self._views, self._memory = task, views, memory
        micro = int(task.args["micro"])
        self.first = micro == 0
        hidden = memory.spec.hidden
        self.norm = memory.weights(views, task.reads, "norm")[:hidden]
        self.x = self._boundary(task.reads, "x.norm.")
        if "targets" in views:
            self.targets = views["targets"].view(torch.int64)[memory.tokens(micro)]
        if "loss" in views:
            self.loss = views["loss"].view(torch.float32)[0]

    def input_gradient(self) -> Tensor:
        """Where the gradient of ``x`` goes [micro_tokens, hidden]."""
        return self._boundary(self._task.writes, "x.")

    def _boundary(self, names: Sequence[str], prefix: str) -> Tensor:
        view = self._views[next(name for name in names if name.startswith(prefix))]
        return self._memory.boundary(view).view(-1, self._memory.spec.hidden)

    def matrix(self) -> Tensor:
        """Rows of the output matrix [rows, hidden]."""
        flat = self._memory.weights(self._views, self._task.reads, self._memory.spec.head.name)
        return flat.view(-1, self._memory.spec.hidden)

    def matrix_gradient(self) -> Tensor | None:
        """Accumulator of their gradient [rows, hidden], unless they are frozen."""
        memory = self._memory
        if memory.spec.head.frozen:
            return None
        size = memory.plan.head_accumulator
        flat = memory.accumulators(self._views, self._task.writes, memory.spec.head.name, size)
        return flat.view(-1, memory.spec.hidden)

    def normed(self) -> Tensor:
        """The norm's output, computed anew: cheaper than keeping it for the sweeps."""
        return self.norm_forward()[0]

    def norm_forward(self) -> tuple[Tensor, Tensor]:
        """The norm's output, and what its backward needs."""
        decoder = self._memory.decoder
        return rms_norm(self.x, self.norm, decoder.norm_eps, centred=decoder.centred)

    def finish_norm(self, dxn: Tensor, rstd: Tensor, dx: Tensor) -> None:
        """Gradients of the norm's input and weight from its output's; ``dx`` may be ``dxn``."""
        memory = self._memory
        _, d_weight = rms_norm_backward(
            dxn, self.x, self.norm, rstd, out=dx, centred=memory.decoder.centred
        )
        if memory.spec.norm.frozen:
            return
        size = memory.plan.layer_accumulator
        flat = memory.accumulators(self._views, self._task.writes, "norm", size)
        store_(flat[: memory.spec.hidden], d_weight, accumulate=not self.first)
