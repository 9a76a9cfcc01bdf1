"""``slideformer profile``: measures this machine, shows and keeps its rates for predictions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from slideformer.graph.errors import ConfigError
from slideformer.graph.machines import Machine, write_machine
from slideformer.graph.tasks import Lane, ProductKind
from slideformer.tools.console import plain_console, stderr_console
from slideformer.tools.graph_cli import write_file


def profile(
    nvme: Annotated[
        list[Path] | None,
        typer.Option(help="Folder on NVMe to measure, too; may be repeated.", metavar="DIR"),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cuda or cpu.")] = "auto",
    output: Annotated[
        Path | None,
        typer.Option(help="Also write the profile here, for --machine.", metavar="FILE.json"),
    ] = None,
) -> None:
    """Measure this machine, so that plans and predictions are made for it.

    Takes up to three minutes on a GPU. Nothing else should run meanwhile.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
    )

    from slideformer.measuring.profiling import measure_machine, sizes_for
    from slideformer.measuring.trial import torch_device
    from slideformer.profiles import store_machine

    if output is not None and not output.absolute().parent.is_dir():
        raise ConfigError(
            f"{output}: cannot be written: there is no folder {output.parent}; give another path "
            "as --output"
        )
    where = torch_device(device)
    sizes = sizes_for(where)
    bar = Progress(
        TextColumn("profile"),
        MofNCompleteColumn(),
        BarColumn(bar_width=20),
        TimeElapsedColumn(),
        TextColumn("{task.fields[last]}"),
        console=stderr_console(),
    )
    with bar:
        task = bar.add_task("profile", total=sizes.parts + bool(nvme), last="")
        machine = measure_machine(
            where, sizes, nvme or (), lambda last: bar.update(task, advance=1, last=last)
        )
    console = plain_console()
    for table in _tables(machine):
        console.print(table)
    kept = store_machine(where.type, machine)
    console.print(f"kept in {kept}; plan, train and simulate use it from now on", soft_wrap=True)
    if output is not None:
        write_file(output, write_machine(machine))


def _tables(machine: Machine) -> list[Table]:
    profile, share = machine.profile, machine.profile.contention
    rates = Table(machine.title, "alone", "beside others", box=None, padding=(0, 2))

    def row(name: str, rate: float, unit: str, lane: Lane | None = None) -> None:
        left = share.get(lane, 1.0) if lane is not None else 1.0
        beside = "" if left == 1.0 else f"{rate * left:.3g} {unit}"
        rates.add_row(name, f"{rate:.3g} {unit}", beside)

    row("copies up", profile.h2d / 1e9, "GB/s", Lane.H2D)
    row("copies down", profile.d2h / 1e9, "GB/s", Lane.D2H)
    row("updates on the CPU", profile.update / 1e9, "G parameters/s", Lane.CPU)
    row("host memory", profile.host_copy / 1e9, "GB/s")
    row("GPU memory", profile.gpu_copy / 1e12, "TB/s")
    row("layers, forward", profile.flops / 1e12, "TFLOP/s", Lane.COMPUTE)
    if not machine.sources["nvme_read"].startswith("assumed"):
        row("NVMe, reading", profile.nvme_read / 1e9, "GB/s", Lane.NVME_READ)
        row("NVMe, writing", profile.nvme_write / 1e9, "GB/s", Lane.NVME_WRITE)
    row("between computations", profile.launch * 1e6, "µs")
    row("between CPU tasks", profile.handover * 1e6, "µs")
    if machine.measured["device"] != "cpu":
        row("GPU memory beside the plan", profile.gpu_overhead / 2**30, "GiB")
    return [rates, *(_curves(machine, kind) for kind in ProductKind)]


def _curves(machine: Machine, kind: ProductKind) -> Table:
    """TFLOP/s of one kind of product: a row for each width, a column for each number of tokens."""
    points = [point for point in machine.profile.points if point.kind is kind]
    sizes = sorted({point.tokens for point in points})
    head = f"{kind}, TFLOP/s"
    table = Table(head, *(f"{size:,}" for size in sizes), box=None, padding=(0, 1))
    for width in sorted({point.width for point in points}):
        known = {point.tokens: point.rate for point in points if point.width == width}
        cells = (f"{known[size] / 1e12:.4g}" if size in known else "" for size in sizes)
        table.add_row(f"{width:,} wide", *cells)
    return table
