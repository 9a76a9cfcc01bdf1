"""Going on with a run: its settings from a checkpoint, and what may be different this time."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from slideformer.checkpointing import Checkpoint
from slideformer.config import CHANGEABLE, Config, config_text, given_flags, parse_config
from slideformer.graph.errors import CheckpointError, ConfigError
from slideformer.models.aside import check_output, free_name
from slideformer.models.data.sources import Source
from slideformer.numerics import PLACEMENT
from slideformer.training.reports import CONFIG_FILE, METRICS_FILE, StepMetrics, metrics_lines

logger = logging.getLogger(__name__)


def checkpoint_files(config: Config, metrics: Iterable[StepMetrics]) -> dict[str, str]:
    """What a checkpoint has beside the state: settings, and the metrics so far."""
    settings = {name: _absolute_paths(value) for name, value in config}
    return {
        CONFIG_FILE: config_text(config.model_copy(update=settings)),
        METRICS_FILE: metrics_lines(metrics),
    }


def _absolute_paths(value: Any) -> Any:
    """A setting with its paths made absolute, so that it means the same in another folder."""
    if isinstance(value, Path):
        return value.absolute()
    if isinstance(value, tuple):
        return tuple(map(_absolute_paths, value))
    if isinstance(value, Source) and value.path.exists():  # else the name of a data set on a hub
        return replace(value, path=value.path.absolute())
    return value


def resumed_config(checkpoint: Checkpoint, overrides: Mapping[str, object]) -> Config:
    """The settings of the run that wrote ``checkpoint``, with others put over them.

    Raises `CheckpointError` if no training run wrote it, `ConfigError` for a setting that a resumed
    run has to keep.
    """
    given = given_flags(overrides)
    for name in given:
        if name not in CHANGEABLE:
            raise ConfigError(
                f"{name} cannot be changed when a run is resumed, as the result would be that of "
                f"neither setting; these can: {', '.join(CHANGEABLE)}"
            )
    text = checkpoint.text(CONFIG_FILE)
    return parse_config(text, str(checkpoint.folder / CONFIG_FILE), given)


def check_resumed_output(config: Config, checkpoint: Checkpoint) -> None:
    """Check that the output is free, or of the run itself, which was interrupted before.

    Raises `CheckpointError` if it is something else, or holds more steps than the checkpoint.
    """
    output = config.output.absolute()
    path = output / CONFIG_FILE
    if not output.is_dir() or not any(output.iterdir()):
        return
    try:
        found = parse_config(path.read_text(encoding="utf-8"), str(path), {})
        steps = len((output / METRICS_FILE).read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError, ConfigError):
        found = None
    if found is None or _kept(found) != _kept(config):
        raise CheckpointError(
            f"output folder {output} is not empty and not of this run: move it away, or give "
            "another one"
        )
    if steps > checkpoint.info.step:
        raise CheckpointError(
            f"output folder {output} holds the result of {steps} steps, the checkpoint "
            f"{checkpoint.folder} is of {checkpoint.info.step}: nothing is left to resume; to "
            "train from the checkpoint again, give another output"
        )


def free_output(config: Config, checkpoint: Checkpoint | None) -> Path:
    """Where a run that is over may save: its output, or beside it if that was taken meanwhile.

    Raises `CheckpointError` if nothing can be made there.
    """
    try:
        if checkpoint is None:
            check_output(config.output)
        else:
            check_resumed_output(config, checkpoint)
    except CheckpointError as error:
        free = free_name(config.output.absolute())
        logger.warning("%s; meanwhile the model is saved as %s", error, free)
        return free
    return config.output


def warn_of_numerics(checkpoint: Checkpoint, numerics: Mapping[str, str | int]) -> None:
    """Say so if the rest of the run will be rounded otherwise than before."""
    before = checkpoint.info.numerics
    for name, value in numerics.items():
        if name not in PLACEMENT and before.get(name) != value:
            logger.warning(
                "%s was %s and is %s now: the result will differ in the last bits from that of a "
                "run without interruption", name, before.get(name), value,
            )  # fmt: skip


def _kept(config: Config) -> dict[str, Any]:
    settings = config.model_dump()
    return {name: value for name, value in settings.items() if name not in CHANGEABLE}
