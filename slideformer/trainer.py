"""The trainer: from a config to a fine-tuned checkpoint.

    result = Trainer(load_config("run.yaml", {})).train()

Draws batches one ahead, keeps the engine's steps overlapped by reading each result one step late,
and saves at the end: weights, the merged config, the metrics of every step and what decided the
rounding. Whatever can be refused is refused before memory is allocated. How progress is shown is
the caller's matter.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Generator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from transformers import AutoTokenizer

from slideformer.config import Config, save_config
from slideformer.engine import Engine
from slideformer.graph.errors import CheckpointError
from slideformer.graph.model import ModelSpec
from slideformer.graph.plan import MemoryPlan
from slideformer.handles import StepHandle
from slideformer.interrupt import Interrupt
from slideformer.models.aside import check_output
from slideformer.models.data.batches import Batch, BatchStream
from slideformer.models.data.corpus import check_source
from slideformer.models.data.dataset import load_datasets
from slideformer.models.families import read_model_config
from slideformer.planning import spec_for
from slideformer.schedule import Schedule, learning_rates
from slideformer.traces import make_folder, write_trace

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

CONFIG_FILE = "slideformer.yaml"
"""The merged config, within the output folder."""

METRICS_FILE = "metrics.jsonl"
"""One `StepMetrics` a line, within the output folder."""

NUMERICS_FILE = "numerics.json"
"""`Engine.numerics`, within the output folder."""

_MUCH_PADDING = 0.1
"""Share of padding from which on packing is worth a word."""

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")


@dataclass(frozen=True, slots=True)
class RunStart:
    """What is known before memory is allocated; ``steps`` is how many are to come."""

    config: Config
    spec: ModelSpec
    plan: MemoryPlan
    steps: int


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """One finished step.

    ``step`` counts from 1, ``loss`` is the mean per target token in nats, ``tokens`` are real ones
    (no padding), ``seconds`` is the time since the step before was done. ``skipped``: the gradient
    was not finite, so the step changed nothing.
    """

    step: int
    loss: float
    gradient_norm: float
    lr: float
    tokens: int
    seconds: float
    skipped: bool


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """What a run did.

    ``loss`` is that of the last step; ``tokens_per_second`` counts real tokens and leaves the first
    step out if there are others. ``interrupted``: Ctrl-C ended the run early.
    """

    steps: int
    loss: float
    tokens_per_second: float
    output: Path
    interrupted: bool


class Progress(Protocol):
    """What a trainer reports to; called in the thread of `Trainer.train`, so it should be quick."""

    def start(self, run: RunStart) -> None:
        """The run is planned, and nothing large is allocated yet."""

    def step(self, metrics: StepMetrics) -> None:
        """A step is done."""

    def finish(self) -> None:
        """The last step is done, or the run has failed."""


class Trainer:
    """Fine-tunes the model of ``config`` on its data and saves it to its output folder.

    ``schedule`` gives each step its learning rate, instead of the schedule that ``config`` names.
    """

    def __init__(self, config: Config, *, schedule: Schedule | None = None) -> None:
        self.config = config
        self._schedule = schedule

    def train(self, progress: Progress | None = None) -> TrainingResult:
        """Run all steps and save.

        In the main thread, Ctrl-C finishes the steps in flight, saves, and returns a result that
        says so; a second one raises `KeyboardInterrupt` at once and saves nothing.

        Raises:
            SlideFormerError: any of the tree but `GraphError`; nothing is saved then. Before memory
                is allocated: output, model, data, settings or budgets cannot work. Later:
                `TaskError` or `NonFiniteError` from a step, `CheckpointError` from saving.
            KeyboardInterrupt: see above, or Ctrl-C before the first step.
        """
        config = self.config
        check_output(config.output)
        spec = spec_for(read_model_config(config.model), config)
        for source in (*config.data, *config.validation):
            check_source(source)  # finds a missing file before the model is planned
        run = _Run(config, spec, load_tokenizer(config.model), progress, self._schedule)
        try:
            engine = Engine(config, on_plan=run.prepare)
            with Interrupt(f"to {config.output}") as interrupt:
                try:
                    run.train(engine, interrupt)
                    engine.save(config.output)
                finally:
                    if not interrupt.forced:  # to close is to wait for what is in flight
                        engine.close()
        finally:
            if progress is not None:
                progress.finish()
        _save_records(config, run.metrics, engine.numerics)
        if config.trace is not None:
            write_trace(config.trace, engine.graph, engine.timeline())
        return run.result()


class _Run:
    """The loop over the steps, and what they gave."""

    def __init__(
        self,
        config: Config,
        spec: ModelSpec,
        tokenizer: PreTrainedTokenizerFast,
        progress: Progress | None,
        schedule: Schedule | None,
    ) -> None:
        self.metrics: list[StepMetrics] = []
        self._config = config
        self._spec = spec
        self._tokenizer = tokenizer
        self._progress = progress
        self._schedule = schedule
        self._interrupted = False
        self._done_at = 0.0

    def prepare(self, plan: MemoryPlan) -> None:
        """Read the data, the last thing that can be refused, and report the plan."""
        config = self._config
        dataset, self._validation = load_datasets(
            config.data, config.validation, config.validation_split, self._tokenizer,
            seq_len=config.seq_len, seed=config.seed,
        )  # fmt: skip
        for each in (dataset, self._validation):
            if each is not None:
                each.check_vocabulary(self._spec.vocab)
        epochs = None if config.steps else config.epochs or 1
        self._stream = BatchStream(
            dataset, config.batch_size, config.seed, epochs, packing=config.packing
        )
        padding = self._stream.padding_share
        logger.info(
            "an epoch has %d steps; %.1f %% of their tokens is padding%s",
            self._stream.steps_per_epoch, 100 * padding,
            ", which packing would fill" if padding > _MUCH_PADDING and not config.packing else "",
        )  # fmt: skip
        steps = config.steps or self._stream.steps or 0
        self._rates = learning_rates(config, steps, self._schedule)
        if config.trace is not None:
            make_folder(config.trace)
        if self._progress is not None:
            self._progress.start(RunStart(config, self._spec, plan, steps))

    def train(self, engine: Engine, interrupt: Interrupt) -> None:
        """Run steps until there are enough, the data ends, or the user asks to stop."""
        self._done_at = time.perf_counter()
        unread: StepHandle | None = None
        steps = 0
        # Closed here and not by its destructor, which would swallow a second Ctrl-C.
        with closing(_drawn_ahead(self._stream)) as batches:
            for batch in batches:
                if steps == self._config.steps:
                    break
                if interrupt.asked:
                    self._interrupted = True
                    break
                if batch.target_tokens == 0:
                    logger.warning("skipped a batch of %d rows without a target token", batch.rows)
                    continue
                handle = engine.step(batch, lr=self._rates[steps])
                steps += 1
                if unread is not None:
                    self._read(unread)
                unread = handle
        if unread is None:  # there is a target in the data, so only Ctrl-C can be the reason
            raise KeyboardInterrupt
        self._read(unread)

    def _read(self, handle: StepHandle) -> None:
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
        self._done_at = now
        self.metrics.append(metrics)
        if self._progress is not None:
            self._progress.step(metrics)

    def result(self) -> TrainingResult:
        """The summary of a run of at least one step."""
        timed = self.metrics[1:] or self.metrics
        return TrainingResult(
            steps=len(self.metrics),
            loss=self.metrics[-1].loss,
            tokens_per_second=sum(m.tokens for m in timed) / sum(m.seconds for m in timed),
            output=self._config.output,
            interrupted=self._interrupted,
        )


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a model folder; code that a folder ships is never run.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    # Asked without files, some tokenizer classes give one of an empty vocabulary.
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise CheckpointError(
            f"model folder {folder} has no tokenizer (tokenizer.json): copy the tokenizer's files "
            "of the same model there"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    # The tokenizer classes raise errors of many types, for a damaged file plain `Exception`.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(
            f"the tokenizer in {folder} cannot be read ({reason}): download it again"
        ) from error
    # It may be a slow one all the same, which is the data set's to refuse.
    return cast("PreTrainedTokenizerFast", tokenizer)


def _drawn_ahead(stream: BatchStream) -> Generator[Batch]:
    """The batches of a stream, the next one drawn in a thread while the caller works on one."""
    with ThreadPoolExecutor(1, thread_name_prefix="slideformer-batches") as pool:
        following: Future[Batch | None] = pool.submit(next, stream, None)
        while (batch := following.result()) is not None:
            following = pool.submit(next, stream, None)
            yield batch


def _save_records(
    config: Config, metrics: list[StepMetrics], numerics: Mapping[str, str | int]
) -> None:
    """Write config, metrics and numerics into the output folder."""
    lines = "".join(json.dumps(_plain(m)) + "\n" for m in metrics)
    try:
        save_config(config, config.output / CONFIG_FILE)
        _write_text(config.output / METRICS_FILE, lines)
        _write_text(config.output / NUMERICS_FILE, json.dumps(numerics, indent=2) + "\n")
    except OSError as error:
        raise CheckpointError(
            f"the checkpoint in {config.output} is complete, but not all of {CONFIG_FILE}, "
            f"{METRICS_FILE} and {NUMERICS_FILE} could be written beside it: "
            f"{error.strerror or error}"
        ) from error


def _plain(metrics: StepMetrics) -> dict[str, float | int | bool | None]:
    """As values of JSON, which has no numbers that are not finite."""
    return {
        name: value if math.isfinite(value) else None for name, value in asdict(metrics).items()
    }


def _write_text(path: Path, text: str) -> None:
    """Write a file aside and then in its place."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)
