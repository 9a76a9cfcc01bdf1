"""Machine profiles as data: named machines that ship with the package, and files of the same form.

A profile file gives a sustained rate for each kind of work, each with its source. Nothing is
measured here; measured files have the same form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from slideformer.graph.errors import ConfigError
from slideformer.graph.plan import MachineProfile

VERSION = 1

_FILES = resources.files("slideformer.graph") / "data"


class _Schema(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class _Rate(_Schema):
    value: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    basis: Literal["measured", "derated", "assumed"]
    source: Annotated[str, Field(min_length=1)]


class _Rates(_Schema):
    h2d: _Rate
    d2h: _Rate
    flops: _Rate
    update: _Rate
    host_copy: _Rate
    nvme_read: _Rate
    nvme_write: _Rate
    launch: _Rate


class _File(_Schema):
    format: Literal["slideformer-machine"]
    version: Literal[1]
    name: Annotated[str, Field(min_length=1)]
    title: str
    gpu_memory: Annotated[int, Field(gt=0, lt=1 << 63)]
    rates: _Rates


@dataclass(frozen=True, slots=True)
class Machine:
    """A named machine: its profile, bytes of GPU memory, and where each rate comes from.

    ``sources`` maps a rate to its basis and source: ``measured`` on such a machine, a datasheet's
    figure ``derated`` by a share measured elsewhere, or ``assumed``.
    """

    title: str
    profile: MachineProfile
    gpu_memory: int
    sources: Mapping[str, str]


@cache
def machine_names() -> tuple[str, ...]:
    """Names that `load_machine` knows."""
    files = (file.name for file in _FILES.iterdir())
    return tuple(sorted(name.removesuffix(".json") for name in files if name.endswith(".json")))


def load_machine(name: str) -> Machine:
    """The machine of that name, or of the file at that path if it ends in ``.json``.

    Raises `ConfigError` for an unknown name, with the nearest ones, and for a file that cannot
    be read, has another version or a rate that is missing, unknown or not positive.
    """
    if name.endswith(".json"):
        try:
            return parse_machine(Path(name).read_bytes(), name)
        except OSError as error:
            raise ConfigError(f"{name}: cannot be read: {error.strerror}") from None
    if name not in machine_names():
        near = get_close_matches(name.lower(), machine_names(), n=2, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        known = ", ".join(machine_names())
        raise ConfigError(f"unknown machine {name!r}; {hint}known: {known}, or a .json file")
    return parse_machine((_FILES / f"{name}.json").read_bytes(), name)


def parse_machine(text: bytes | str, where: str) -> Machine:
    """The machine that a profile file describes; ``where`` names the file in errors."""
    try:
        file = _File.model_validate_json(text)
    except ValidationError as error:
        problem = error.errors()[0]
        if problem["loc"] == ("version",):
            raise ConfigError(
                f"{where}: has version {problem['input']!r}, this program reads version {VERSION}"
            ) from None
        field = ".".join(map(str, problem["loc"])) or "file"
        found = "" if problem["type"] == "missing" else f" is {problem['input']!r:.60}"
        raise ConfigError(f"{where}: {field}{found}: {problem['msg']}") from None
    rates = {key: getattr(file.rates, key) for key in _Rates.model_fields}
    return Machine(
        title=file.title,
        profile=MachineProfile(name=file.name, **{key: rate.value for key, rate in rates.items()}),
        gpu_memory=file.gpu_memory,
        sources={key: f"{rate.basis}: {rate.source}" for key, rate in rates.items()},
    )
