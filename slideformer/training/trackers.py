"""Metrics for TensorBoard and Weights & Biases, written while a run trains.

Both packages are optional; a setting that needs one that is missing is refused before anything is
planned.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from slideformer.config import Config
from slideformer.graph.errors import ConfigError
from slideformer.training.reports import Progress, RunStart, StepMetrics


def with_trackers(config: Config, progress: Progress | None) -> Progress:
    """Reports to ``progress``, and to what ``config`` names.

    Raises `ConfigError` for one whose package is not installed.
    """
    found = [] if progress is None else [progress]
    if config.tensorboard is not None:
        found.append(TensorBoard(config.tensorboard))
    if config.wandb is not None:
        found.append(WeightsAndBiases(config.wandb))
    return _Several(found)


class TensorBoard:
    """Writes event files into a folder, those of a resumed run in place of what came after."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError(
                f"tensorboard is {folder}, but the package is not installed; install it with: pip "
                "install 'slideformer[tensorboard]'"
            ) from None
        self._folder = folder
        self._make: Any = SummaryWriter
        self._writer: Any = None

    def start(self, run: RunStart) -> None:
        """Open the event file."""
        try:
            self._writer = self._make(str(self._folder), purge_step=run.done + 1)
        except OSError as error:
            raise ConfigError(
                f"tensorboard folder {self._folder} cannot be written: {error.strerror}; name "
                "another with --tensorboard"
            ) from None

    def step(self, metrics: StepMetrics) -> None:
        """Write a step's figures."""
        for name, value in scalars(metrics).items():
            self._writer.add_scalar(name, value, metrics.step)

    def finish(self) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()


class WeightsAndBiases:
    """Logs to a project; account and address are those that the package is set up with."""

    def __init__(self, project: str) -> None:
        try:
            import wandb
        except ImportError:
            raise ConfigError(
                f"wandb is {project!r}, but the package is not installed; install it with: pip "
                "install 'slideformer[wandb]'"
            ) from None
        self._project = project
        self._library: Any = wandb
        self._run: Any = None

    def start(self, run: RunStart) -> None:
        """Open the run; a resumed one goes on under the name of its output folder."""
        output = run.config.output.absolute()
        identity = hashlib.blake2b(str(output).encode(), digest_size=8).hexdigest()
        try:
            self._run = self._library.init(
                project=self._project,
                name=output.name,
                id=identity,
                resume="allow" if run.done else None,
                config=run.config.model_dump(mode="json"),
            )
        except Exception as error:  # of many types: no account, no network, a bad name
            raise ConfigError(
                f"wandb project {self._project!r} cannot be opened: {error}; check `wandb login`, "
                "or set WANDB_MODE=offline"
            ) from error

    def step(self, metrics: StepMetrics) -> None:
        """Log a step's figures."""
        self._run.log(scalars(metrics), step=metrics.step)

    def finish(self) -> None:
        """Close the run."""
        if self._run is not None:
            self._run.finish()


def scalars(metrics: StepMetrics) -> dict[str, float]:
    """The finite figures of a step by name, and its tokens per second."""
    values = {**asdict(metrics), "tokens_per_second": metrics.tokens / metrics.seconds}
    return {
        name: float(value)
        for name, value in values.items()
        if name != "step" and value is not None and math.isfinite(value)
    }


class _Several:
    """Reports to several in turn."""

    def __init__(self, parts: Sequence[Progress]) -> None:
        self._parts = parts

    def start(self, run: RunStart) -> None:
        for part in self._parts:
            part.start(run)

    def step(self, metrics: StepMetrics) -> None:
        for part in self._parts:
            part.step(metrics)

    def finish(self) -> None:
        for part in self._parts:
            part.finish()
