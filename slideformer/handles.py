"""What became of a step that was submitted to an engine."""

from __future__ import annotations

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
        """Euclidean norm of all gradients; known when the step's last update is done."""
        return self._results.gradient_norm.result()

    def wait(self) -> None:
        """Until every task of the step is done."""
        self._done.result()
