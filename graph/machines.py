"""Machine profiles as data: named machines that ship with the package, and files of the same form.

A profile file gives a sustained rate for each kind of work, each with its source. One that was
measured (by ``slideformer profile``) also has rates of matrix products by kind and size, what lanes
take from each other, and what exists on the GPU beside what is planned. Nothing is measured here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from difflib import get_close_matches
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from slideformer.graph.errors import ConfigError
from slideformer.graph.profile import MachineProfile
from slideformer.graph.rates import RatePoint
from slideformer.graph.tasks import Lane, ProductKind

VERSION: Literal[2] = 2

_BESIDE = "contention."
"""Before a lane's name: the source of what it keeps beside its rivals."""

_FILES = resources.files("slideformer.graph") / "data"


class _Schema(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


_Positive = Annotated[float, Field(ge=1e-15, le=1e20)]
"""What a rate a second, or seconds, can be; times and their sums stay finite."""


class _Rate(_Schema):
    value: _Positive
    basis: Literal["measured", "derated", "assumed"]
    source: Annotated[str, Field(min_length=1)]


class _Rates(_Schema):
    h2d: _Rate
    d2h: _Rate
    flops: _Rate
    update: _Rate
    host_copy: _Rate
    gpu_copy: _Rate
    nvme_read: _Rate
    nvme_write: _Rate
    launch: _Rate
    handover: _Rate


_Size = Annotated[int, Field(gt=0, le=1 << 60)]


class _Point(_Schema):
    kind: ProductKind
    width: _Size
    tokens: _Size
    rate: Annotated[_Positive, Field(ge=1)]


class _Share(_Rate):
    value: Annotated[float, Field(ge=1e-6, le=1)]


class _Contention(_Schema):
    compute: _Share | None = None
    h2d: _Share | None = None
    d2h: _Share | None = None
    cpu: _Share | None = None
    nvme_read: _Share | None = None
    nvme_write: _Share | None = None


class _File(_Schema):
    format: Literal["slideformer-machine"] = "slideformer-machine"
    version: Literal[2] = VERSION
    name: Annotated[str, Field(min_length=1)]
    title: str
    gpu_memory: _Size
    rates: _Rates
    products: tuple[_Point, ...] = ()
    contention: _Contention = _Contention()
    gpu_overhead: _Size | None = None
    measured: dict[str, str] = Field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Machine:
    """A named machine: its profile, bytes of GPU memory, and where each rate comes from.

    ``sources`` maps a rate, or ``contention.LANE``, to its basis and source: ``measured`` on such a
    machine, a datasheet's figure ``derated`` by a share measured elsewhere, or ``assumed``.
    ``measured`` says with what and when a measured profile was made.
    """

    title: str
    profile: MachineProfile
    gpu_memory: int
    sources: Mapping[str, str]
    measured: Mapping[str, str] = field(default_factory=dict)


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
    rates: dict[str, _Rate] = {key: getattr(file.rates, key) for key in _Rates.model_fields}
    shares: dict[str, _Share] = {key: share for key, share in file.contention if share is not None}
    values: dict[str, Any] = {key: rate.value for key, rate in rates.items()}
    profile = MachineProfile(
        name=file.name,
        **values,
        points=tuple(RatePoint(p.kind, p.width, p.tokens, p.rate) for p in file.products),
        contention={Lane(key): share.value for key, share in shares.items()},
    )
    if file.gpu_overhead is not None:
        profile = replace(profile, gpu_overhead=file.gpu_overhead)
    return Machine(
        title=file.title,
        profile=profile,
        gpu_memory=file.gpu_memory,
        sources={key: _source(rate) for key, rate in rates.items()}
        | {f"{_BESIDE}{key}": _source(share) for key, share in shares.items()},
        measured=file.measured,
    )


def write_machine(machine: Machine) -> str:
    """The file of a machine, which `parse_machine` reads."""
    profile = machine.profile
    file = _File.model_validate(
        {
            "name": profile.name,
            "title": machine.title,
            "gpu_memory": machine.gpu_memory,
            "rates": {
                key: _with_source(getattr(profile, key), machine.sources[key])
                for key in _Rates.model_fields
            },
            "products": tuple(asdict(point) for point in profile.points),
            "contention": {
                lane: _with_source(share, machine.sources[f"{_BESIDE}{lane}"])
                for lane, share in profile.contention.items()
            },
            "gpu_overhead": profile.gpu_overhead,
            "measured": dict(machine.measured),
        }
    )
    return file.model_dump_json(indent=2) + "\n"


def _source(rate: _Rate) -> str:
    return f"{rate.basis}: {rate.source}"


def _with_source(value: float, source: str) -> dict[str, Any]:
    basis, _, text = source.partition(": ")
    return {"value": value, "basis": basis, "source": text}
