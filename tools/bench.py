"""Compares the engine with a baseline, in turn on one machine, and measures the memory of both.

A *row* is one shape, batch and budget against one baseline. Both sides run in processes of their
own and take turns: a *turn* is some warm-up steps and some measured ones, a *pair* one turn of
each. Where both fit the GPU together they stay there; otherwise each gives its memory back before
the other's turn and starts anew in its next. Ours is measured first and alone until its context's
size is known.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from slideformer.config import parse_size
from slideformer.graph.errors import ConfigError
from slideformer.tools.bench_worker import Worker, WorkerError
from slideformer.tools.host_memory import HostPeak

logger = logging.getLogger(__name__)

BASELINES = ("R1", "R2", "R3", "R4", "none")
_ROW_FIELDS = ("shape", "batch_size", "gpu_memory", "cpu_memory", "baseline")
_PACKAGES = ("torch", "triton", "transformers", "liger-kernel", "deepspeed", "numpy")


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
    settings: dict[str, Any] = {}

    @property
    def label(self) -> str:
        """How the row is called in tables."""
        more = "".join(f" {name}={value}" for name, value in self.settings.items())
        return f"{self.shape} b{self.batch_size} gpu {self.gpu_memory or 'free'}{more}"

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

    Names are those of the engine's settings, or ``seq_len`` and ``gpu_cap``. Raises `ConfigError`.
    """
    values = dict(common)
    settings = dict(values.pop("settings", {}))
    for position, part in enumerate(text.split(":")):
        name, equals, value = part.partition("=")
        if equals:
            target = values if name in ("seq_len", "gpu_cap") else settings
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


class Comparison:
    """One row being measured; close it in the end, whatever happened."""

    def __init__(self, row: Row, turns: Turns, device: str) -> None:
        self.row = row
        self._turns = turns
        self._device = device
        self._together = True
        self._ours = Worker("slideformer.tools.bench_ours:Ours")
        self._baseline: Worker | None = None
        if row.baseline != "none":
            self._baseline = Worker("slideformer.tools.baseline:Baseline")
        self.result: dict[str, Any] = {"row": row.model_dump(), "device": device}

    def run(self) -> dict[str, Any]:
        """Measure everything; raises `WorkerError`. What was found so far stays in ``result``."""
        cap = self.row.gpu_cap
        ours, result = self._ours, self.result
        ours.ask("hello", device=self._device, gpu_cap=parse_size(cap) if cap else None)
        host = HostPeak(ours.pid)
        try:
            result["engine"] = self._build_ours()
            first = ours.ask("run", steps=1, warmup=self._turns.warmup)
            if "used" in first:
                result["gpu_context"] = first["used"] - first["reserved"]
            if self._baseline is not None:
                self._prepare_baseline(self._baseline)
            self._take_turns()
            host.sample()
        finally:
            host.close()
            result["host_peak"], result["host_samples"] = host.peak, host.samples
        return result

    def trace(self) -> dict[str, Any]:
        """The spans of the last steps."""
        trace: dict[str, Any] = self._ours.ask("trace")
        return trace

    def close(self) -> None:
        """End both processes."""
        for worker in (self._ours, self._baseline):
            if worker is not None:
                worker.close()

    def _build_ours(self) -> dict[str, Any]:
        built: dict[str, Any] = self._ours.ask(
            "build", shape=self.row.shape, settings=self.row.engine_settings()
        )
        return built

    def _prepare_baseline(self, baseline: Worker) -> None:
        """Start it up beside ours; where that does not fit, let the two give way to each other."""
        row = self.row
        hello = baseline.ask("hello", device=self._device)
        baseline.ask(
            "prepare",
            recipe=row.baseline,
            model=row.shape,
            batch_size=row.batch_size,
            seq_len=row.seq_len,
        )
        self.result["liger"] = hello["liger"]
        self.result["baseline_kernels"] = "Liger" if hello["liger"] else "plain transformers"
        try:
            found = baseline.ask("run", steps=1, warmup=self._turns.warmup)
            self._together = not found.get("retries")
        except WorkerError as error:
            if not error.out_of_memory:
                raise
            self._together = False
        if not self._together:
            logger.info("%s: the two do not fit the GPU together; they take turns", row.label)
            baseline.ask("release")

    def _take_turns(self) -> None:
        turns = {"steps": self._turns.steps, "warmup": self._turns.warmup}
        ours: list[dict[str, Any]] = []
        theirs: list[dict[str, Any]] = []
        self.result["sharing"] = "together" if self._together else "in turn, each rebuilt"
        self.result["ours"], self.result["theirs"] = ours, theirs
        for pair in range(self._turns.pairs):
            if not self._together and pair > 0:
                self._build_ours()
            ours.append(self._ours.ask("run", **turns))
            if self._baseline is None:
                continue
            if not self._together:
                self._ours.ask("release")
            theirs.append(self._baseline.ask("run", **turns))
            if not self._together:
                self._baseline.ask("release")


def summary(result: Mapping[str, Any]) -> dict[str, Any]:
    """What a table shows of a row; figures that were not measured are missing."""
    row = Row.model_validate(result["row"])
    tokens = row.batch_size * row.seq_len
    found: dict[str, Any] = {"label": row.label, "baseline": row.baseline}
    ours = [turn["step_seconds"] for turn in result.get("ours", ())]
    theirs = [turn["step_seconds"] for turn in result.get("theirs", ())]
    if ours:
        found["ours"] = tokens / statistics.median(ours)
        found["ours_spread"] = [tokens / max(ours), tokens / min(ours)]
        found["step_seconds"] = statistics.median(ours)
    if theirs:
        found["theirs"] = tokens / statistics.median(theirs)
        found["theirs_spread"] = [tokens / max(theirs), tokens / min(theirs)]
        pairs = zip(ours, theirs, strict=False)
        found["ratio"] = statistics.median(their / our for our, their in pairs)
    for side in ("ours", "theirs"):
        for name in ("allocated_peak", "reserved_peak"):
            peaks = [turn[name] for turn in result.get(side, ()) if name in turn]
            if peaks:
                found[f"{side}_{name}"] = max(peaks)
    found["host_peak"] = result.get("host_peak")
    found["gpu_context"] = result.get("gpu_context")
    plan = result.get("engine", {}).get("plan", {})
    found["plan_gpu_peak"] = plan.get("gpu_peak")
    found["plan_host_peak"] = plan.get("host_peak")
    found["plan_step_seconds"] = plan.get("step_seconds")
    return found


def machine(device: str) -> dict[str, Any]:
    """What was measured on: machine, versions, commit, command."""
    gpu = _output("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    root = Path(__file__).resolve().parent.parent
    return {
        "host": platform.node(),
        "device": device,
        "gpu": gpu or None,
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
        "commit": _output("git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"),
        "command": " ".join(["slideformer", *sys.argv[1:]]),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _output(*command: str) -> str:
    """What a command prints; nothing where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
