"""The kinds of values that settings have, how they are read from text, and sizes for reading."""

from __future__ import annotations

import os
import re
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from pydantic.fields import FieldInfo

from slideformer.graph.errors import ConfigError
from slideformer.models.data.sources import Source, parse_sources
from slideformer.models.paths import path_problem
from slideformer.settings.sections import LoraSettings, ParameterGroup, read_groups, read_lora

_UNITS = {
    "": 1,
    "b": 1,
    **{f"{prefix}b": 1000**i for i, prefix in enumerate("kmgt", start=1)},
    **{f"{prefix}ib": 1024**i for i, prefix in enumerate("kmgt", start=1)},
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE | re.ASCII)
_LEAST_BUDGET = 2**20
_MOST = 2**60
"""More than any memory has; sums of such sizes stay within 64 bits."""

MOST_ROWS = 2**20
"""Rows of a step: the planner looks at all ways to divide them."""


def parse_size(text: str | int) -> int:
    """Bytes of a size such as ``"24GiB"``, ``"100 GB"``, ``"1.5 TiB"`` or a plain number of bytes.

    KB, MB, GB, TB count in thousands, KiB, MiB, GiB, TiB in 1024s; case does not matter. Fractions
    of a byte are dropped. Raises ``ConfigError`` for anything else, and for more than an EiB.
    """
    match = _SIZE.fullmatch(str(text))
    unit = match and _UNITS.get(match[2].lower())
    if match is None or unit is None:
        raise ConfigError(f"{text!r} is not a size; write it like 24GiB, 100 GB or 1073741824")
    size = int(Decimal(match[1]) * unit)
    if size > _MOST:
        raise ConfigError(
            f"{text!r} is above {format_size(_MOST)}, which no memory has; write it like 24GiB"
        )
    return size


def format_size(size: int) -> str:
    """A number of bytes for reading: ``"23.50 GiB"``, below one GiB ``"512.00 MiB"`` and so on."""
    if size < 1024:
        return f"{size} B"
    exponent, unit = next(
        (e, u) for e, u in ((3, "GiB"), (2, "MiB"), (1, "KiB")) if size >= 1024**e
    )
    return f"{size / 1024**exponent:.2f} {unit}"


def _budget(value: Any) -> Any:
    if value is None:
        return None
    try:
        size = parse_size(value)
    except ConfigError as error:
        raise ValueError(str(error)) from None
    if size < _LEAST_BUDGET:
        raise ValueError(
            f"{value!r} is {format_size(size)}, below the least budget of "
            f"{format_size(_LEAST_BUDGET)}; write it like 24GiB"
        )
    return size


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"{value!r} is not a number; write it like 1e-5")
    return value


def _path(value: Any) -> Any:
    if isinstance(value, str):
        if not value.strip():
            raise ValueError(f"{value!r} is not a path; name a file or folder")
        value = Path(os.path.expanduser(value))
    if isinstance(value, Path) and (problem := path_problem(value)):
        raise ValueError(f"{str(value)!r:.60} is not a path: {problem}; name a file or folder")
    return value


def _sources(value: Any) -> Any:
    try:
        return parse_sources(value)
    except ConfigError as error:
        raise ValueError(str(error)) from None


def _several(value: Any) -> Any:
    return [value] if isinstance(value, str | Path) else value


def is_size(field: FieldInfo) -> bool:
    """Whether a setting's value is a number of bytes."""
    return any(isinstance(m, BeforeValidator) and m.func is _budget for m in field.metadata)


Budget = Annotated[int | None, BeforeValidator(_budget)]
Count = Annotated[int, Field(strict=True, ge=1, le=10**9)]
Number = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Location = Annotated[Path, BeforeValidator(_path)]
Locations = Annotated[tuple[Location, ...], BeforeValidator(_several)]
LoraBlock = Annotated[LoraSettings | None, BeforeValidator(read_lora)]
Groups = Annotated[tuple[ParameterGroup, ...], BeforeValidator(read_groups)]
Sources = Annotated[tuple[Source, ...], BeforeValidator(_sources)]
