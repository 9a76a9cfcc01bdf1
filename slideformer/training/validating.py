"""Validation while a run trains: when, on what, which step was the best, and when to stop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace

from slideformer.config import Config
from slideformer.engine import Engine
from slideformer.graph.errors import DataError
from slideformer.handles import StepHandle
from slideformer.models.data.batches import BatchStream
from slideformer.models.data.dataset import TokenDataset
from slideformer.training.reports import StepMetrics

_HIGHEST = 700.0
"""Loss above which its exponential is beyond the floating-point numbers."""


class Validation:
    """Evaluates on a data set, or on none; ``before`` are the metrics of a run that is resumed.

    ``best`` is the step with the lowest loss so far. Raises `DataError` for data without a target.
    """

    def __init__(
        self, dataset: TokenDataset | None, config: Config, before: Iterable[StepMetrics] = ()
    ) -> None:
        self.best: int | None = None
        self._lowest = math.inf
        self._stale = 0
        self._every, self._patience = config.evaluate_every, config.patience
        self._stream: BatchStream | None = None
        if dataset is not None:
            if not dataset.target_tokens:
                raise DataError(f"{dataset.source}: what is validated with has no target token")
            # The order does not matter, and it is the same in every run.
            self._stream = BatchStream(dataset, config.step_rows, 0, 1, packing=config.packing)
        for metrics in before:
            self.note(metrics)

    def due(self, step: int, *, last: bool = False) -> bool:
        """Whether to evaluate after a step: every so often, and after the last one."""
        if self._stream is None:
            return False
        return last or (self._every is not None and step % self._every == 0)

    def run(self, metrics: StepMetrics, engine: Engine, stop: Callable[[], object]) -> StepMetrics:
        """Evaluate after the engine's last step; returns its metrics with what came out.

        They stay as they are if ``stop`` says so meanwhile. Raises what failed the run.
        """
        loss = self._loss_of(engine, stop)
        if loss is None:
            return metrics
        perplexity = math.exp(loss) if loss < _HIGHEST else math.inf
        found = replace(metrics, validation_loss=loss, validation_perplexity=perplexity)
        self.note(found)
        return found

    def _loss_of(self, engine: Engine, stop: Callable[[], object]) -> float | None:
        """Mean loss per target token of all data, in nats; batches overlap as steps do."""
        assert self._stream is not None
        total, tokens = 0.0, 0
        unread: StepHandle | None = None
        for number in range(self._stream.steps_per_epoch):
            if stop():
                return None
            batch = self._stream.batch(number)
            if not batch.target_tokens:
                continue
            handle = engine.evaluate(batch)
            if unread is not None:
                total += unread.loss() * unread.target_tokens
            unread = handle
            tokens += batch.target_tokens
        assert unread is not None
        return (total + unread.loss() * unread.target_tokens) / tokens

    def note(self, metrics: StepMetrics) -> None:
        """Take a step's metrics into account."""
        loss = metrics.validation_loss
        if loss is None:
            return
        if loss < self._lowest:
            self.best, self._lowest, self._stale = metrics.step, loss, 0
        else:
            self._stale += 1

    @property
    def exhausted(self) -> bool:
        """Whether the last ``patience`` evaluations were not better than the best."""
        return self._patience is not None and self._stale >= self._patience
