"""The loop over a run's steps: draws batches one ahead and reads each result one step late.

So the engine's steps overlap. What is to be done before and after is the trainer's.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from slideformer.checkpoint_info import digest
from slideformer.checkpointing import Checkpoint
from slideformer.config import Config
from slideformer.engine import Engine
from slideformer.graph.errors import ConfigError
from slideformer.graph.model import ModelSpec
from slideformer.graph.plan import Budgets, MemoryPlan
from slideformer.handles import StepHandle
from slideformer.models.data.batches import Batch, BatchStream
from slideformer.models.data.dataset import load_datasets
from slideformer.schedule import Schedule, learning_rates
from slideformer.traces import make_folder
from slideformer.training.checkpoints import RunCheckpoints
from slideformer.training.interrupt import Interrupt
from slideformer.training.reports import (
    METRICS_FILE,
    Progress,
    RunStart,
    StepMetrics,
    TrainingResult,
    read_metrics,
)
from slideformer.training.resuming import checkpoint_files, warn_of_numerics
from slideformer.training.validating import Validation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

_MUCH_PADDING = 0.1
"""Share of padding from which on packing is worth a word."""


class TrainingLoop:
    """The steps of a run, and what they gave; ``start`` is the checkpoint to go on from, if any."""

    def __init__(
        self,
        config: Config,
        spec: ModelSpec,
        tokenizer: PreTrainedTokenizerFast,
        progress: Progress,
        schedule: Schedule | None,
        start: Checkpoint | None,
    ) -> None:
        self.metrics = [] if start is None else read_metrics(start.text(METRICS_FILE))
        self._config = config
        self._spec = spec
        self._tokenizer = tokenizer
        self._progress = progress
        self._schedule = schedule
        self._start = start
        self.output = config.output
        self._done = len(self.metrics)
        self._drawn = 0
        self._interrupted = False
        self._done_at = 0.0

    def prepare(self, plan: MemoryPlan, budgets: Budgets) -> None:
        """Read the data, the last thing that can be refused, and report the plan."""
        config = self._config
        dataset, validation = load_datasets(
            config.data, config.validation, config.validation_split, self._tokenizer,
            seq_len=config.seq_len, seed=config.seed,
        )  # fmt: skip
        for each in (dataset, validation):
            if each is not None:
                each.check_vocabulary(self._spec.vocab)
        self._validation = Validation(validation, config, self.metrics)
        epochs = None if config.steps else config.epochs or 1
        self._stream = BatchStream(
            dataset, config.step_rows, config.seed, epochs, packing=config.packing
        )
        padding = self._stream.padding_share
        logger.info(
            "an epoch has %d steps; %.1f %% of their tokens is padding%s",
            self._stream.steps_per_epoch, 100 * padding,
            ", which packing would fill" if padding > _MUCH_PADDING and not config.packing else "",
        )  # fmt: skip
        steps = config.steps or self._stream.steps or 0
        self._rates = learning_rates(config, steps, self._schedule)
        if self._start is not None:
            self._go_on(self._start)
        if config.trace is not None:
            make_folder(config.trace)
        self._progress.start(RunStart(config, self._spec, plan, budgets, steps, self._done))

    def _go_on(self, start: Checkpoint) -> None:
        """Continue the data where the checkpoint's run was; refuse what is not that run's."""
        training = start.info.training
        if training["rates"] != digest(self._rates):
            raise ConfigError(
                f"the learning rates are not those of the run that wrote {start.folder}: resume it "
                "with the same schedule, Trainer.resume(…, schedule=…)"
            )
        self._stream.load_state_dict(training["data"])
        self._drawn = training["batches"]

    def train(self, engine: Engine, interrupt: Interrupt, checkpoints: RunCheckpoints) -> None:
        """Run steps until there are enough, the data ends, or the user or patience ends it."""
        if self._start is not None:
            warn_of_numerics(self._start, engine.numerics)
            checkpoints.go_on(self._done, self._validation.best)

        def asked() -> bool:
            return interrupt.asked is not None

        self._catch_up(engine, asked)
        self._done_at = time.perf_counter()
        unread: StepHandle | None = None
        # Closed here and not by its destructor, which would swallow a second Ctrl-C.
        with closing(_drawn_ahead(self._stream)) as batches:
            for batch in batches:
                if engine.steps == self._config.steps or self._validation.exhausted:
                    break
                if interrupt.asked:
                    self._interrupted = True
                    break
                self._drawn += 1
                if batch.target_tokens == 0:
                    logger.warning("skipped a batch of %d rows without a target token", batch.rows)
                    continue
                handle = engine.step(batch, lr=self._rates[engine.steps])
                if unread is not None:
                    self._read(unread, engine, checkpoints)
                unread = handle
                if self._validation.due(handle.number):
                    self._read(handle, engine, checkpoints, stop=asked)
                    unread = None
                if self._due(handle.number):
                    self._checkpoint(engine, checkpoints)
        if unread is not None:
            evaluate = self._validation.due(unread.number, last=not self._interrupted)
            self._read(unread, engine, checkpoints, stop=asked if evaluate else None)
        elif not self.metrics:  # there is a target in the data, so only Ctrl-C can be the reason
            raise KeyboardInterrupt
        if self._interrupted or self._due(engine.steps):
            self._checkpoint(engine, checkpoints)
        checkpoints.wait()

    def _catch_up(self, engine: Engine, stop: Callable[[], object]) -> None:
        """Evaluate the step of the checkpoint, if Ctrl-C ended the run while that was done."""
        if self.metrics and self._validation.due(self._done) and not self.metrics[-1].evaluated:
            self.metrics[-1] = self._validation.run(self.metrics[-1], engine, stop)

    def _due(self, step: int) -> bool:
        """Whether a step's checkpoint is wanted: every so often, and of the best step so far."""
        every = self._config.checkpoint_every
        keeps_best = every is not None or self._config.patience is not None
        return (every is not None and step % every == 0) or (
            keeps_best and step == self._validation.best
        )

    def _checkpoint(self, engine: Engine, checkpoints: RunCheckpoints) -> None:
        """Begin a checkpoint of the last step, and complete it if the step's results are known."""
        checkpoints.begin(engine, self._position())
        if len(self.metrics) == engine.steps:
            self._complete(checkpoints)

    def _complete(self, checkpoints: RunCheckpoints) -> None:
        files = checkpoint_files(self._config, self.metrics)
        checkpoints.read(len(self.metrics), files, self._validation.best)

    def _read(
        self,
        handle: StepHandle,
        engine: Engine,
        checkpoints: RunCheckpoints,
        stop: Callable[[], object] | None = None,
    ) -> None:
        """Wait for a step's results; with ``stop``, the last step's, and evaluate after it."""
        loss, norm = handle.loss(), handle.gradient_norm()
        now = time.perf_counter()
        metrics = StepMetrics(
            step=handle.number,
            loss=loss,
            gradient_norm=norm,
            lr=self._rates[handle.number - 1],
            tokens=handle.real_tokens,
            seconds=now - self._done_at,
            skipped=handle.skipped(),
        )
        if stop is not None:
            metrics = self._validation.run(metrics, engine, stop)
            now = time.perf_counter()
        self._done_at = now
        self.metrics.append(metrics)
        if checkpoints.begun == handle.number:
            self._complete(checkpoints)
        self._progress.step(metrics)

    def _position(self) -> dict[str, object]:
        """Where the run is in its data and its schedule, for a checkpoint."""
        data = self._stream.state_dict(self._drawn)
        return {"batches": self._drawn, "data": data, "rates": digest(self._rates)}

    def result(self, checkpoint: Path | None) -> TrainingResult:
        """The summary of a run of at least one step."""
        new = self.metrics[self._done :]
        timed = new[1:] or new
        seconds = sum(m.seconds for m in timed)
        return TrainingResult(
            steps=len(self.metrics),
            loss=self.metrics[-1].loss,
            tokens_per_second=sum(m.tokens for m in timed) / seconds if timed else 0.0,
            output=self.output,
            interrupted=self._interrupted,
            checkpoint=checkpoint,
            exhausted=self._validation.exhausted,
            best=self._validation.best,
        )


def _drawn_ahead(stream: BatchStream) -> Generator[Batch]:
    """The batches of a stream, the next one drawn in a thread while the caller works on one."""
    with ThreadPoolExecutor(1, thread_name_prefix="slideformer-batches") as pool:
        following: Future[Batch | None] = pool.submit(next, stream, None)
        while (batch := following.result()) is not None:
            following = pool.submit(next, stream, None)
            yield batch
