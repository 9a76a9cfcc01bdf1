"""The checkpoints of a training run: where they lie, which are kept, and how to find one again.

Those of a run that saves to ``tuned`` are ``tuned-checkpoints/step-40`` and so on; ``best`` there
is a link to the one with the lowest validation loss. They are completed in a thread while training
goes on, one at a time. One that cannot be written is reported and does not end the run.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from slideformer.checkpoint_info import file_sizes
from slideformer.checkpointing import Checkpoint, PendingCheckpoint
from slideformer.config import Config
from slideformer.engine import Engine
from slideformer.graph.errors import CheckpointError
from slideformer.graph.model import ModelSpec
from slideformer.graph.plan import Compute, Optimizer
from slideformer.models.aside import check_room, discard, remove_orphans
from slideformer.models.export import saved_nbytes
from slideformer.runtime.checkpoints import MANIFEST

logger = logging.getLogger(__name__)

_PREFIX = "step-"

BEST = "best"
"""Name of the link to the checkpoint with the lowest validation loss."""


def checkpoints_folder(output: Path) -> Path:
    """Where the checkpoints of the run with that output lie."""
    return output.absolute().with_name(f"{output.absolute().name}-checkpoints")


def find_checkpoint(run: Path) -> Checkpoint:
    """The checkpoint ``run``, or the last one of the run whose output, or their folder, that is.

    Raises `CheckpointError` if there is none, or if it is damaged.
    """
    run = run.absolute()
    if (run / MANIFEST).exists():
        return Checkpoint(run)
    for folder in (checkpoints_folder(run), run):
        steps = _steps(folder)
        if steps:
            return Checkpoint(steps[max(steps)])
    raise CheckpointError(
        f"{run} has no checkpoint to resume from: give the output folder of a run that was "
        f"interrupted or had checkpoint_every set, or one of the folders in "
        f"{checkpoints_folder(run)}"
    )


class RunCheckpoints:
    """Writes the checkpoints of the run with that ``output`` and keeps the last ``keep``."""

    def __init__(self, output: Path, keep: int) -> None:
        self.folder = checkpoints_folder(output)
        self.last: Path | None = None
        self.begun: int | None = None
        self._output = output
        self._keep = keep
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="slideformer-checkpoints")
        self._pending: PendingCheckpoint | None = None
        self._training: Mapping[str, Any] = {}
        self._completion: Future[None] | None = None

    def check_new(self) -> None:
        """Raise `CheckpointError` if another run's lie there already."""
        if steps := _steps(self.folder):
            raise CheckpointError(
                f"{self.folder} holds checkpoints of an earlier run, the last of step "
                f"{max(steps)}: go on with it by `slideformer resume {self._output}`, give another "
                "output, or remove them"
            )

    def check_room(self, spec: ModelSpec, config: Config, dtype: torch.dtype) -> None:
        """Raise `CheckpointError` unless there is room for what the run is to leave.

        That is the output, its weights stored in ``dtype``, and two checkpoints if there are to be
        any: one goes when the next is complete.
        """
        nbytes, what = saved_nbytes(spec, dtype), f"output {self._output}"
        if config.checkpoint_every is not None:
            sizes = file_sizes(spec, Compute(config.compute), Optimizer(config.optimizer))
            nbytes += (1 if _steps(self.folder) else 2) * sum(sizes.values())
            what = f"checkpoints and {what}"
        check_room(self._output, nbytes, what)

    def clean(self) -> None:
        """Remove what a killed run left half written or half removed."""
        remove_orphans(self.folder / "*")
        with contextlib.suppress(OSError):
            (self.folder / f".{BEST}").unlink()

    def go_on(self, step: int, best: int | None) -> None:
        """Discard what a run killed behind the checkpoint of ``step`` had no time to discard."""
        steps = {found: path for found, path in _steps(self.folder).items() if found <= step}
        self._keep_last(steps, step, best)

    def begin(self, engine: Engine, training: Mapping[str, Any]) -> None:
        """Begin one of the engine's last submitted step, unless that has one.

        Waits for the one before. Raises what failed an earlier step.
        """
        step = engine.steps
        if step == self.begun:
            return
        self.wait()
        try:
            self._pending = engine.checkpoint(self.folder / f"{_PREFIX}{step}")
        except CheckpointError as error:
            self._report(step, error)
        self.begun, self._training = step, training

    def read(self, step: int, files: Mapping[str, str], best: int | None) -> None:
        """Complete what was begun at ``step``, in the background: its results are known now.

        ``best`` is the step whose checkpoint is kept for being the best, if it has one.
        """
        if self._pending is not None and self._pending.step == step and self._completion is None:
            self._completion = self._pool.submit(
                self._complete, self._pending, files, self._training, best
            )

    def wait(self) -> None:
        """Until what is being completed is."""
        if self._completion is not None:
            self._completion.result()
            self._completion = self._pending = None

    def close(self) -> None:
        """Wait for what is being completed and give up what is not."""
        self._pool.shutdown()
        if self._pending is not None and self._completion is None:
            self._pending.abort()
        with contextlib.suppress(OSError):
            self.folder.rmdir()  # if there is none

    def abandon(self) -> None:
        """Remove what is incomplete without waiting for those who write to it."""
        self._pool.shutdown(wait=False)
        if self._pending is not None:
            self._pending.abandon()
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def name_last(self) -> None:
        """After a failure, say from where the run can go on."""
        self._pool.shutdown()
        if steps := _steps(self.folder):
            logger.warning(
                "the last checkpoint is %s; `slideformer resume %s` goes on from there",
                steps[max(steps)], self._output,
            )  # fmt: skip

    def _complete(
        self,
        pending: PendingCheckpoint,
        files: Mapping[str, str],
        training: Mapping[str, Any],
        best: int | None,
    ) -> None:
        try:
            self.last = pending.finish(files, training)
        except CheckpointError as error:
            self._report(pending.step, error)
            return
        logger.info("checkpoint %s", self.last)
        # Later ones are of a future that was given up.
        self._keep_last(_steps(self.folder), pending.step, best)

    def _keep_last(self, steps: Mapping[int, Path], last: int, best: int | None) -> None:
        """Of ``steps``, discard all but the ``keep`` up to ``last`` and the best."""
        kept = sorted(step for step in steps if step <= last)[-self._keep :]
        if best is not None and best in steps:
            kept.append(best)
            self._link(steps[best].name)
        for step, path in steps.items():
            if step not in kept:
                discard(path)

    def _link(self, name: str) -> None:
        """Let ``best`` be a link to a checkpoint; replaced at once, as everything here."""
        new = self.folder / f".{BEST}"
        new.unlink(missing_ok=True)
        new.symlink_to(name)
        new.replace(self.folder / BEST)

    @staticmethod
    def _report(step: int, error: CheckpointError) -> None:
        logger.warning("no checkpoint of step %d: %s", step, error)


def _steps(folder: Path) -> dict[int, Path]:
    """The checkpoints in a folder by step."""
    return {
        int(path.name.removeprefix(_PREFIX)): path
        for path in folder.glob(f"{_PREFIX}*")
        if path.name.removeprefix(_PREFIX).isdecimal()
    }
