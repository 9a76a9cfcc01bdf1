"""``slideformer report``: one page about a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slideformer.tools import step_flags as flags
from slideformer.tools.graph_cli import write_file


def report(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="Output folder of a run, or a checkpoint.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="HTML page to write.", metavar="FILE")
    ] = Path("report.html"),
    machine: flags.MachineName = None,
) -> None:
    """Write one HTML page: curves, plan, settings and a measured step. It needs no network."""
    from slideformer.tools.report.page import report_page
    from slideformer.tools.report.run_folder import read_run

    write_file(output, report_page(read_run(run), flags.chosen_machine(machine)))
    print(f"wrote {output}")
