"""``slideformer bench``: the command line of the benchmark. Measures nothing itself."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from slideformer.graph.errors import ConfigError
from slideformer.tools.console import run_alone

FORMAT_VERSION = 1


def bench(
    shape: Annotated[str, typer.Option(help="Named shape, with random weights.")] = "llama3-3b",
    batch_size: Annotated[int, typer.Option(help="Rows per step.")] = 16,
    seq_len: Annotated[int, typer.Option(help="Tokens per row.")] = 1024,
    gpu_memory: Annotated[str | None, typer.Option(help="GPU budget, as 12GiB.")] = None,
    cpu_memory: Annotated[str | None, typer.Option(help="Host budget.")] = None,
    gpu_cap: Annotated[
        str | None, typer.Option(help="Hard bound on our process's reserved GPU memory.")
    ] = None,
    baseline: Annotated[str, typer.Option(help="R1, R2, R3, R4, LoRA, layer or none.")] = "R1",
    phantom: Annotated[
        bool,
        typer.Option("--phantom", help="Back most layers' state by that of two; trains nothing."),
    ] = False,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Engine setting name=value; repeatable.")
    ] = None,
    row: Annotated[
        list[str] | None,
        typer.Option(help="shape:batch:gpu:cpu:baseline[:name=value…]; repeatable."),
    ] = None,
    rows: Annotated[Path | None, typer.Option(help="YAML file with a list of rows.")] = None,
    pairs: Annotated[int, typer.Option(help="Turns of each side.", min=1)] = 5,
    steps: Annotated[int, typer.Option(help="Measured steps of a turn.", min=1)] = 3,
    warmup: Annotated[int, typer.Option(help="Steps before those.", min=1)] = 2,
    device: Annotated[str, typer.Option(help="auto, cuda or cpu.")] = "auto",
    floors: Annotated[
        bool, typer.Option("--floors", help="Also measure what the machine could do at best.")
    ] = False,
    trace: Annotated[
        Path | None,
        typer.Option(help="Folder for each row's graph, and when its last steps ran."),
    ] = None,
    loss_check: Annotated[
        bool, typer.Option("--loss-check", help="Only compare losses on real text with R2's.")
    ] = False,
    frozen: Annotated[
        bool, typer.Option("--frozen", help="With --loss-check: train nothing, so that it fails.")
    ] = False,
    scheduler: Annotated[
        bool,
        typer.Option("--scheduler", help="Only measure what deciding costs, on a large graph."),
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write all raw figures here.")
    ] = None,
) -> None:
    """Compare the engine with a baseline in turn, and measure the memory of both."""
    from slideformer.tools.bench.comparison import measure
    from slideformer.tools.bench.loss_check import check_losses
    from slideformer.tools.bench.overhead import decision_costs
    from slideformer.tools.bench.report import machine
    from slideformer.tools.bench.rows import Turns, make_row, parse_row, read_rows

    report: dict[str, Any] = {"version": FORMAT_VERSION, "machine": machine(), "rows": []}
    if frozen and not loss_check:
        raise ConfigError("--frozen only makes sense with --loss-check")
    if loss_check:
        found = check_losses(device, _settings(settings or []), frozen=frozen)
        _finish({**report, "loss_check": found}, json_file, passed=found["passed"])
        return
    if scheduler:
        costs = decision_costs(device)
        _finish({**report, "scheduler": costs}, json_file, passed=costs["passed"])
        return
    common = {
        "shape": shape,
        "batch_size": batch_size,
        "seq_len": seq_len,
        "gpu_memory": gpu_memory,
        "cpu_memory": cpu_memory,
        "gpu_cap": gpu_cap,
        "baseline": baseline,
        "phantom": phantom,
        "settings": _settings(settings or []),
    }
    wanted = [parse_row(text, common) for text in row or []]
    if rows is not None:
        wanted += read_rows(rows, common)
    wanted = wanted or [make_row(common, "bench")]
    turns = Turns(pairs=pairs, steps=steps, warmup=warmup)
    report["turns"] = turns.model_dump()
    for number, each in enumerate(wanted, start=1):
        folder = trace and trace / f"row{number}"
        result = measure(each, turns, device, floors=floors, trace=folder)
        report["rows"].append(result)
        if json_file is not None:
            _write(json_file, report)
    _finish(report, json_file, passed=not any("error" in each for each in report["rows"]))


def _finish(report: dict[str, Any], json_file: Path | None, *, passed: bool) -> None:
    """Print a report, write it, and end with an exit code that says how it went."""
    from slideformer.tools.bench.report import table

    if json_file is not None:
        _write(json_file, report)
    for line in table(report):
        print(line)
    if not passed:
        raise typer.Exit(1)


def _settings(texts: Iterable[str]) -> dict[str, Any]:
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set {text!r} is not name=value")
        found[name] = yaml.safe_load(value)
    return found


def _write(path: Path, report: Mapping[str, Any]) -> None:
    try:
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None


def main() -> None:
    """Run the benchmark without the rest of the command line."""
    run_alone(bench)


if __name__ == "__main__":
    main()
