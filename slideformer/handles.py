"""What became of a step that was submitted to an engine."""

from __future__ import annotations

import math
from concurrent.futures import Future
from dataclasses import dataclass

from slideformer.models.context import StepResults


@dataclass(frozen=True)
class StepHandle:
    """What became of a step or an evaluation; reading a result waits for it.

    Waiting raises the error that failed the run, if one did.
    """

    number: int
    target_tokens: int
    real_tokens: int
    _results: StepResults
    _done: Future[None]

    def loss(self) -> float:
        """Mean loss per target token, in nats."""
        return self._results.loss.result()

    def gradient_norm(self) -> float:
        """Euclidean norm of all gradients, before clipping; known when the last of them is.

        It is not finite if the step was skipped.
        """
        return self._results.gradient_norm.result()

    def skipped(self) -> bool:
        """Whether the step changed nothing, because a gradient was not finite."""
        return not math.isfinite(self.gradient_norm())

    def wait(self) -> None:
        """Until every task of the step is done."""
        self._done.result()
