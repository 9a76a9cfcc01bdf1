"""The trainer: from a config to a fine-tuned model.

    result = Trainer(load_config("run.yaml", {})).train()

Runs the loop over the steps (``training/loop.py``) and saves at the end: weights, the merged
config, the metrics of every step and what decided the rounding. Whatever can be refused is refused
before memory is allocated. How progress is shown is the caller's matter.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Self

from slideformer.checkpointing import Checkpoint
from slideformer.config import Config
from slideformer.engine import Engine
from slideformer.graph.errors import CheckpointError, ConfigError, SlideFormerError
from slideformer.models.aside import check_output
from slideformer.models.data.corpus import check_source
from slideformer.models.families import read_model_config
from slideformer.models.stored_weights import check_weights
from slideformer.models.tokenizers import load_tokenizer
from slideformer.planning import spec_for
from slideformer.schedule import Schedule
from slideformer.traces import write_trace
from slideformer.training.checkpoints import RunCheckpoints, find_checkpoint
from slideformer.training.interrupt import Interrupt
from slideformer.training.loop import TrainingLoop
from slideformer.training.only_run import only_run, remove_lock
from slideformer.training.reports import Progress, TrainingResult, output_records
from slideformer.training.resuming import check_resumed_output, free_output, resumed_config
from slideformer.training.trackers import with_trackers


class Trainer:
    """Fine-tunes the model of ``config`` on its data and saves it to its output folder.

    ``schedule`` gives each step its learning rate, instead of the schedule that ``config`` names.
    With ``checkpoint``, of a run of such a config, it goes on from there; see `resume`.
    """

    def __init__(
        self,
        config: Config,
        *,
        schedule: Schedule | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        self.config = config
        self._schedule = schedule
        self._checkpoint = checkpoint

    @classmethod
    def resume(
        cls,
        run: Path | str,
        overrides: Mapping[str, object] = MappingProxyType({}),
        *,
        schedule: Schedule | None = None,
    ) -> Self:
        """A trainer that goes on with a run: a checkpoint, or the last one of the output ``run``.

        ``overrides`` are settings by name, of those that may change (`CHANGEABLE`); a run with a
        ``schedule`` of its own has to be given it again. The result is that of a run that was never
        interrupted, bit for bit, as long as `Engine.numerics` are the same (a warning says if not;
        on a GPU it also takes ``deterministic``). Raises `CheckpointError` or `ConfigError`.
        """
        checkpoint = find_checkpoint(Path(run))
        config = resumed_config(checkpoint, overrides)
        return cls(config, schedule=schedule, checkpoint=checkpoint)

    def train(self, progress: Progress | None = None) -> TrainingResult:
        """Run all steps and save.

        In the main thread, Ctrl-C finishes the steps in flight, writes a checkpoint, saves, and
        returns a result that says so; a second one raises `KeyboardInterrupt` at once and saves
        nothing.

        Raises:
            SlideFormerError: any of the tree but `GraphError`; nothing is saved then. Before memory
                is allocated: output, model, data, settings or budgets cannot work, or another run
                is saving to the output. Later: `TaskError` or `NonFiniteError` from a step,
                `CheckpointError` from saving.
            KeyboardInterrupt: see above, or Ctrl-C before the first step.
        """
        try:
            if self._checkpoint is None:
                check_output(self.config.output)
            else:
                check_resumed_output(self.config, self._checkpoint)
        except CheckpointError:
            remove_lock(self.config.output)
            raise
        with only_run(self.config.output):
            return self._train(with_trackers(self.config, progress))

    def _train(self, reports: Progress) -> TrainingResult:
        config, checkpoint = self.config, self._checkpoint
        checkpoints = RunCheckpoints(config.output, config.keep_checkpoints)
        if checkpoint is None:
            checkpoints.check_new()
        spec = spec_for(read_model_config(config.model), config)
        checkpoints.clean()
        for source in (*config.data, *config.validation):
            check_source(source)  # finds a missing file before the model is planned
        tokenizer = load_tokenizer(config.model)
        loop = TrainingLoop(config, spec, tokenizer, reports, self._schedule, checkpoint)
        try:
            stored = checkpoint.stored if checkpoint else check_weights(config.model, spec)
            checkpoints.check_room(spec, config, stored)
            engine = Engine(config, checkpoint=checkpoint, on_plan=loop.prepare)
            with Interrupt(f"a checkpoint, and the model to {config.output}") as interrupt:
                try:
                    loop.train(engine, interrupt, checkpoints)
                    records = partial(output_records, config, loop.metrics, engine)
                    output = free_output(config, checkpoint)
                    loop.output = engine.save(output, records, replace=checkpoint is not None)
                except SlideFormerError:
                    checkpoints.name_last()
                    raise
                finally:
                    if interrupt.forced:
                        checkpoints.abandon()
                    else:  # to close is to wait for what is in flight
                        checkpoints.close()
                        engine.close()
        finally:
            reports.finish()
        if config.trace is not None:
            try:
                write_trace(config.trace, engine.graph, engine.timeline())
            except ConfigError as error:
                raise ConfigError(f"{error}; the model is saved as {loop.output}") from None
        return loop.result(checkpoints.last)
