"""Where training data comes from: files, data sets and their weights, as settings name them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from slideformer.graph.errors import ConfigError
from slideformer.models.paths import path_problem

_MOST_WEIGHT = 1000


@dataclass(frozen=True, slots=True)
class Source:
    """A file of documents, a folder of Hugging Face datasets, or a data set's name on the Hub.

    ``weight`` says how often an epoch shows each document: 2 shows all of them twice, 0.5 half of
    them, and the other half in the next epoch. ``split`` is that of a data set; files have none.
    """

    path: Path
    weight: float = 1.0
    split: str = "train"


def parse_sources(value: object) -> tuple[Source, ...]:
    """Sources from a path, or a list of paths and of ``{path: …, weight: …, split: …}``.

    Raises `ConfigError` for anything else.
    """
    entries = value if isinstance(value, list | tuple) else [value]
    return tuple(_source(entry) for entry in entries)


def _source(entry: object) -> Source:
    if isinstance(entry, Source):
        return entry
    settings = entry if isinstance(entry, Mapping) else {"path": entry}
    unknown = [name for name in settings if name not in ("path", "weight", "split")]
    if unknown or "path" not in settings:
        raise ConfigError(
            f"{dict(settings)!r} is no source; write a path, or path, weight and split: "
            "{path: train.jsonl, weight: 2}"
        )
    path: object = settings["path"]
    weight: object = settings.get("weight", 1.0)
    split: object = settings.get("split", "train")
    if not isinstance(path, str | Path) or not str(path).strip():
        raise ConfigError(f"{path!r} is not a path; name a file")
    if problem := path_problem(Path(path)):
        raise ConfigError(f"{str(path)!r:.60} is not a path: {problem}; name a file")
    if (
        isinstance(weight, bool)
        or not isinstance(weight, int | float)
        or not 0 < weight <= _MOST_WEIGHT
    ):
        raise ConfigError(
            f"the weight of {path} is {weight!r}; it must be a number above 0 and at most "
            f"{_MOST_WEIGHT}, where 1 shows each document once an epoch"
        )
    if not isinstance(split, str) or not split:
        raise ConfigError(f"the split of {path} is {split!r}; write a name, such as train")
    return Source(Path(os.path.expanduser(path)), float(weight), split)
