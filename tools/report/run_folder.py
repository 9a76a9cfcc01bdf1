"""Reads what a run left in its folder: metrics, settings, plan, and a step's graph and trace."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slideformer.config import Config, load_config
from slideformer.graph.errors import DataError, SlideFormerError
from slideformer.simulation import GraphTimeline
from slideformer.tools.graph_cli import read_graph
from slideformer.tools.view_cli import read_trace
from slideformer.traces import GRAPH_FILE, TRACE_FILE
from slideformer.training.reports import CONFIG_FILE, METRICS_FILE, PLAN_FILE

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunFolder:
    """A run: ``metrics`` are its lines, ``plan`` its plan's fields, ``step`` a measured step."""

    name: str
    metrics: list[dict[str, Any]]
    config: Config | None
    plan: dict[str, Any]
    step: GraphTimeline | None


def read_run(folder: Path) -> RunFolder:
    """What is in an output folder of ``slideformer train``, or in one of its checkpoints.

    A step is taken from there, or from the folder that the run's setting ``trace`` names. Raises
    DataError for a folder without metrics, and for what is there and cannot be read; a trace that
    is not whole is left out with a warning.
    """
    metrics = _metrics(folder / METRICS_FILE)
    settings = folder / CONFIG_FILE
    config = load_config(settings, {}) if settings.is_file() else None
    return RunFolder(
        folder.resolve().name,
        metrics,
        config,
        _plan(folder / PLAN_FILE),
        _step([folder, *([config.trace] if config is not None and config.trace else [])]),
    )


def _metrics(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise DataError(
            f"{path.parent}: holds no {path.name}; give the output folder of a run of `slideformer "
            "train`, or one of its checkpoints"
        )
    lines = _text(path).splitlines()
    found = [_object(f"{path}, line {n}", line) for n, line in enumerate(lines, start=1)]
    for number, line in enumerate(found, start=1):
        if not isinstance(line.get("step"), int):
            raise DataError(f"{path}, line {number}: has no 'step'; is it of this program?")
    if not found:
        raise DataError(f"{path}: holds no step yet")
    return found


def _plan(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    found = _object(path, _text(path))
    if (version := found.pop("version", None)) != 1:
        raise DataError(f"{path}: is of version {version!r}; this program reads version 1")
    return found


def _object(where: Path | str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: malformed JSON: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"{where}: holds no JSON object; is it of this program?")
    return value


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: is not UTF-8; is it of this program?") from None


def _step(folders: list[Path]) -> GraphTimeline | None:
    for folder in folders:
        graph, trace = folder / GRAPH_FILE, folder / TRACE_FILE
        if graph.is_file() and trace.is_file():
            try:
                return read_trace(trace, read_graph(graph))
            except SlideFormerError as error:
                logger.warning("%s; the page shows no step", error)
    return None
