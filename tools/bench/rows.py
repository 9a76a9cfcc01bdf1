"""Rows of a benchmark: one shape, batch and budget against one baseline, and how they are written.

Whether a shape exists and a budget suffices is found out by who builds the engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from slideformer.config import parse_size
from slideformer.graph.errors import ConfigError

BASELINES = ("R1", "R2", "R3", "R4", "LoRA", "layer", "none")
_ROW_FIELDS = ("shape", "batch_size", "gpu_memory", "cpu_memory", "baseline")


class Row(BaseModel):
    """What is compared in one row; ``settings`` are further ones of `EngineConfig`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shape: str
    batch_size: int = Field(ge=1)
    seq_len: int = Field(default=1024, ge=2)
    gpu_memory: str | None = None
    cpu_memory: str | None = None
    gpu_cap: str | None = None
    baseline: str = "R1"
    phantom: bool = False
    settings: dict[str, Any] = {}

    @property
    def step_rows(self) -> int:
        """Rows of an optimizer step, on both sides."""
        return self.batch_size * int(self.settings.get("accumulate", 1))

    @property
    def label(self) -> str:
        """How the row is called in tables."""
        more = "".join(f" {name}={value}" for name, value in self.settings.items())
        kind = " phantom" if self.phantom else ""
        return f"{self.shape}{kind} b{self.batch_size} gpu {self.gpu_memory or 'free'}{more}"

    def engine_settings(self) -> dict[str, Any]:
        """Keyword arguments of `EngineConfig`, the model and the device left out."""
        sizes = {
            name: parse_size(value)
            for name in ("gpu_memory", "cpu_memory")
            if (value := getattr(self, name)) is not None
        }
        return {
            "batch_size": self.batch_size,
            "seq_len": self.seq_len,
            **sizes,
            **self.settings,
        }


class Turns(BaseModel):
    """How often and how long."""

    model_config = ConfigDict(frozen=True)

    pairs: int = Field(default=5, ge=1)
    steps: int = Field(default=3, ge=1)
    warmup: int = Field(default=2, ge=1)


def parse_row(text: str, common: Mapping[str, Any]) -> Row:
    """A row written ``shape:batch:gpu:cpu:baseline[:name=value…]``; empty parts take ``common``.

    Names are those of the engine's settings, or ``seq_len``, ``gpu_cap`` and ``phantom``. Raises
    `ConfigError`.
    """
    values = dict(common)
    settings = dict(values.pop("settings", {}))
    for position, part in enumerate(text.split(":")):
        name, equals, value = part.partition("=")
        if equals:
            target = values if name in ("seq_len", "gpu_cap", "phantom") else settings
            target[name] = yaml.safe_load(value)
        elif position >= len(_ROW_FIELDS):
            raise ConfigError(f"row {text!r}: {part!r} is not name=value")
        elif part:
            values[_ROW_FIELDS[position]] = part
    return make_row({**values, "settings": settings}, f"row {text!r}")


def make_row(values: Mapping[str, Any], source: str) -> Row:
    """A row of plain values; raises `ConfigError` naming ``source``."""
    try:
        row = Row.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{source}: {name}: {first['msg']}") from None
    if row.baseline not in BASELINES:
        raise ConfigError(
            f"{source}: baseline is {row.baseline!r}; known are {', '.join(BASELINES)}"
        )
    row.engine_settings()
    return row


def read_rows(path: Path, common: Mapping[str, Any]) -> list[Row]:
    """The rows of a YAML file: a list of mappings of `Row`'s fields. Raises `ConfigError`."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {error}") from None
    if not isinstance(content, list) or not all(isinstance(each, dict) for each in content):
        raise ConfigError(f"{path}: write a list of rows, each 'name: value' pairs")
    return [
        make_row({**common, **each}, f"{path}, row {number}")
        for number, each in enumerate(content, start=1)
    ]
