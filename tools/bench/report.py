"""What a benchmark measured, for reading: the figures of a row, the machine, and the table."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from slideformer.tools.bench.loss_check import report as loss_report
from slideformer.tools.bench.overhead import overhead_report
from slideformer.tools.bench.rows import Row

_GIB = 1 << 30
_PACKAGES = ("torch", "triton", "transformers", "liger-kernel", "deepspeed", "numpy")


def summary(result: Mapping[str, Any]) -> dict[str, Any]:
    """What a table shows of a row; figures that were not measured are missing."""
    row = Row.model_validate(result["row"])
    tokens = row.step_rows * row.seq_len
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


def machine() -> dict[str, Any]:
    """What was measured on: machine, versions, commit, command."""
    gpu = _output(
        "nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"
    )
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    folder = Path(__file__).resolve().parent
    return {
        "host": platform.node(),
        "gpu": gpu or None,
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
        "commit": _output(
            "git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"
        ),
        "command": shlex.join([Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]]),
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


def table(report: Mapping[str, Any]) -> Iterator[str]:
    """A report as text: the machine, a line for each row, and what went wrong."""
    at = report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in at["versions"].items())
    gpus = [row["gpu"] for row in report["rows"] if row.get("gpu")]
    gpu = at["gpu"] or ", ".join(dict.fromkeys(gpus)) or "no GPU"
    yield f"{gpu}; {at['cpu']}, {at['cores']} cores, {_gib(at['memory'])} GiB"
    yield f"Python {at['python']}, {versions}; commit {at['commit'] or 'unknown'}"
    yield f"$ {at['command']}"
    if "loss_check" in report:
        yield from loss_report(report["loss_check"])
        return
    if "scheduler" in report:
        yield from overhead_report(report["scheduler"])
        return
    yield (
        f"{'':34} {'tokens/s (range)':>22} {'baseline (range)':>25} {'ratio':>6} {'step s':>7} "
        f"{'plan':>6}  GPU GiB: allocated, reserved, plan; context; baseline's; host GiB, plan"
    )
    for each in report["rows"]:
        s = each["summary"]
        figures = [_number(s.get("ratio"), 3, 6), _number(s.get("step_seconds"), 3, 7)]
        memory = [
            " ".join(_gib(s.get(name)) for name in names)
            for names in (
                ("ours_allocated_peak", "ours_reserved_peak", "plan_gpu_peak"),
                ("gpu_context",),
                ("theirs_allocated_peak", "theirs_reserved_peak"),
                ("host_peak", "plan_host_peak"),
            )
        ]
        yield (
            f"{s['label']:34} {_rate(s, 'ours'):>22} {s['baseline']} {_rate(s, 'theirs'):>22} "
            f"{' '.join(figures)} {_number(s['plan_step_seconds'], 3, 6)}  {'; '.join(memory)}"
        )
        if "engine" in each:
            yield f"  {_choices(each['engine'])}"
        if "sharing" in each and s["baseline"] != "none":
            yield (
                f"  GPU shared {each['sharing']}; baseline with {each['baseline_kernels']}; "
                f"host memory is {each['host_kind']}"
            )
        if "floors" in each:
            yield from ("  " + line for line in floors_report(each["floors"], s["step_seconds"]))
        # The longest waits only where one row leaves room for them.
        shown = each.get("trace_report", ())[: None if len(report["rows"]) == 1 else 5]
        yield from ("  " + line for line in shown)
        if "error" in each:
            yield f"  failed: {each['error']}"


def _choices(engine: Mapping[str, Any]) -> str:
    """What the planner chose, and how long it took to be ready."""
    plan = engine["plan"]
    names = ("micro_rows", "vocab_chunks", "window", "kept", "offloaded", "gradient_slots")
    chosen = ", ".join(f"{name} {plan[name]}" for name in names)
    resident = len(plan["resident"])
    return f"plan: {chosen}, resident {resident}; built in {engine['build_seconds']:.1f} s"


def _rate(found: Mapping[str, Any], side: str) -> str:
    if side not in found:
        return "-"
    low, high = found[f"{side}_spread"]
    return f"{found[side]:.0f} ({low:.0f}-{high:.0f})"


def _number(value: float | None, digits: int, width: int) -> str:
    return f"{'-' if value is None else f'{value:.{digits}f}':>{width}}"


def _gib(nbytes: int | None) -> str:
    return "-" if nbytes is None else f"{nbytes / _GIB:.2f}"


def floors_report(found: Mapping[str, Any], step_seconds: float | None) -> list[str]:
    """Floors for reading; ``step_seconds`` is what a step took."""
    copies = ", ".join(f"{way} {rate / 1e9:.1f}" for way, rate in found["copies"].items())
    updates = found["updates"]
    rates = ", ".join(
        f"{name} {rate / 1e9:.2f}" for name, rate in updates["params_per_second"].items()
    )
    floors = found["floors"]
    highest = max(floors, key=lambda name: floors[name])
    lines = [
        f"floors, s: {', '.join(f'{name} {value:.3f}' for name, value in floors.items())}",
        f"  copies, GB/s: {copies}; updates with {updates['threads']} threads, "
        f"G parameters/s: {rates}",
        f"  AdamW {updates['adamw_bytes_per_second'] / 1e9:.1f} GB/s, "
        f"{updates['share_of_stream']:.3f} of read-modify-write's "
        f"{updates['stream_bytes_per_second'] / 1e9:.1f}; "
        f"DeepSpeed {updates['deepspeed'] or 'measured'}",
    ]
    if step_seconds is not None:
        lines.append(
            f"  step {step_seconds:.3f} s = {step_seconds / floors[highest]:.3f} × "
            f"the highest floor, {highest}"
        )
    return lines
