"""Deferred updates: the norm of all gradients, and what it decides for every update of its step."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import torch
from torch import Tensor

from slideformer.graph.errors import NonFiniteError
from slideformer.graph.step_update import CLIP
from slideformer.graph.tasks import Task
from slideformer.kernels.adamw import AdamW
from slideformer.models.context import StepContext
from slideformer.models.model_memory import Binding, ModelMemory, Operation, Views, finite

logger = logging.getLogger(__name__)

SKIP_LIMIT = 10
"""Steps skipped one after another before the run fails: by then it is not the data of a step."""


def optimizer_of(task: Task, context: StepContext) -> AdamW | None:
    """The settings by which an update works, or None if its step is skipped."""
    if CLIP in task.after:
        return context.results.decision.result()  # known: the task came first
    return context.training()[1]


def clip_factor(norm: float, max_norm: float | None) -> float:
    """min(1, max_norm / (norm + 1e-6)) in FP32, as `torch.nn.utils.clip_grad_norm_` takes it."""
    if max_norm is None:
        return 1.0
    total = torch.tensor(norm, dtype=torch.float32)
    return float(torch.clamp(max_norm / (total + 1e-6), max=1.0))


class ClipOps:
    """Takes the norm and decides.

    ``max_norm`` None does not clip; without ``skip``, a norm that is not finite fails the step.
    ``skipped`` steps changed nothing before this run.
    """

    def __init__(
        self, memory: ModelMemory, max_norm: float | None, *, skip: bool, skipped: int
    ) -> None:
        self._memory = memory
        self._max_norm = max_norm
        self._skip = skip
        self._before = skipped
        self._skipped: list[int] = []
        self._in_a_row = 0

    def table(self) -> dict[str, Binding]:
        """Op name → binding."""
        return {"clip": self.clip}

    def skipped(self, step: int) -> int:
        """How many steps changed nothing, of those up to ``step``, all of which are decided."""
        return self._before + sum(number <= step for number in self._skipped)

    def clip(self, task: Task, views: Views) -> Operation:
        """Sum up all squares and decide; runs after all updates of the step before."""
        parts: list[tuple[str, Tensor]] = []
        for name in task.reads:
            if name.startswith("gh."):
                parts.append((name[3:], self._memory.travelling_square(views[name])))
            elif name == "squares_host":
                units = str(task.args["resident"]).split(",")
                squares = views[name].view(torch.float64)
                parts += zip(units, squares, strict=True)
            else:
                parts.append((name.removeprefix("square."), views[name].view(torch.float64)[0]))

        def run(context: StepContext) -> None:
            squares = {name: float(square) for name, square in parts}
            norm = math.sqrt(math.fsum(squares.values()))
            asked, optimizer = context.training()[1], None
            if math.isfinite(norm):
                self._in_a_row = 0
                factor = clip_factor(norm, self._max_norm)
                step = asked.step - self.skipped(asked.step)
                optimizer = replace(asked, grad_scale=factor, step=step)
            else:
                self._refuse(asked.step, squares)
            context.results.decision.set_result(optimizer)
            context.results.gradient_norm.set_result(norm)

        return run

    def _refuse(self, step: int, squares: dict[str, float]) -> None:
        """Count a step that is skipped; raises `NonFiniteError` if there is to be no other."""
        name, square = next(each for each in squares.items() if not math.isfinite(each[1]))
        if not self._skip:
            finite(square, f"{name}: ")
        self._skipped.append(step)
        self._in_a_row += 1
        logger.warning("step %d is skipped: the gradient of %s is not finite", step, name)
        if self._in_a_row >= SKIP_LIMIT:
            raise NonFiniteError(
                f"{name}: the gradient is not finite, for the {SKIP_LIMIT}th step in a row; they "
                "changed nothing, so the weights are those before the first of them. Lower the "
                "learning rate, set max_grad_norm, or look at the data"
            )
