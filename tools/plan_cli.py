"""``slideformer plan``: what would live where, what holds it back, and what other budgets give."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import typer
from rich.console import Console
from rich.table import Table

from slideformer.graph.errors import ConfigError
from slideformer.graph.plan import MemoryPlan
from slideformer.settings.values import format_size, parse_size
from slideformer.tools import step_flags as flags
from slideformer.tools.console import plain_console
from slideformer.tools.graph_cli import stdout_console
from slideformer.tools.setting_flags import settings_as_flags
from slideformer.whole_files import write_whole

if TYPE_CHECKING:
    from slideformer.outlook import Outlook, Solution
    from slideformer.planning import PlanRequest

POINTS = 13
"""Budgets of a sweep, at equal distances."""

SWEPT = {"gpu-memory": "gpu", "cpu-memory": "host", "nvme-memory": "nvme"}
"""Budgets that may be swept, and their fields."""


@settings_as_flags(flags.STEP)
def plan(
    model: flags.Model = None,
    shape: flags.Shape = None,
    machine: flags.MachineName = None,
    config: Path | None = typer.Option(
        None, "--config", metavar="run.yaml", help="Settings of a run; flags override them."
    ),
    sweep: str | None = typer.Option(
        None, help="Compare budgets, as gpu-memory=8GiB..80GiB.", metavar="BUDGET=FROM..TO"
    ),
    plot: Path | None = typer.Option(
        None, help="Picture of the sweep, .png or .svg. Default: sweep.png.", metavar="FILE"
    ),
    **settings: Any,
) -> None:
    """Print what would live where, and the predicted peaks, without allocating any of it.

    Needs no GPU: give the budget of the one meant with --gpu-memory, or a --machine.
    """
    console = plain_console()
    swept = None if sweep is None else _swept(sweep)
    if swept is not None and swept.name == "gpu-memory":
        # Where there is no GPU this means one elsewhere, with a context, as the flag does.
        settings["gpu_memory"] = swept.values[-1]
    step = flags.wanted_step(model, shape, machine, config, **settings)
    if swept is not None:
        _sweep(stdout_console(), step.request, swept, plot or Path("sweep.png"))
        return
    if plot is not None:
        raise ConfigError("--plot draws a sweep; give --sweep as well")
    from slideformer.outlook import Lattice, outlook
    from slideformer.planning import make_plan
    from slideformer.tools.plan_report import print_plan

    request, lattice = step.request, Lattice(step.request)
    made = make_plan(request, lattice)
    print_plan(console, step.config, request.spec, made, request.budgets, step.machine)
    _print_outlook(console, made, outlook(lattice, made, request.budgets))


def _print_outlook(console: Console, made: MemoryPlan, found: Outlook) -> None:
    lanes = sorted(found.work.items(), key=lambda item: -item[1])
    work = ", ".join(f"{lane} {seconds:.3g} s" for lane, seconds in lanes if seconds)
    gap = made.step_seconds / found.bound - 1
    console.print(
        f"Bound by {found.binding}; work a step: {work}. By it plans are compared, at "
        f"{found.bound:.3g} s a step; simulated, this one is {gap:+.1%} off that",
        soft_wrap=True,
    )
    gains = [
        f"of {name} {f'saves {gain:.1%}' if gain >= 0.001 else 'nothing'}"
        for name, gain in found.gains.items()
    ]
    console.print(f"One GiB more {', '.join(gains)} of a step", soft_wrap=True)


def _sweep(console: Console, request: PlanRequest, swept: _Swept, plot: Path) -> None:
    """Print a table of the plan of the best bound under each budget, and draw it."""
    from slideformer.outlook import solve_each

    text, name, values = swept
    budgets = [replace(request.budgets, **{SWEPT[name]: value}) for value in values]
    found = solve_each(request, budgets)
    console.print(_table(request, name, values, found))
    console.print(
        "By the bound that plans are compared with; for one budget, those near to the best are "
        "simulated as well, and the fastest is taken"
    )
    if not any(found):
        raise ConfigError(f"--sweep {text}: no plan fits any of these budgets; sweep larger ones")
    _draw(plot, request, name, values, found)
    console.print(f"drawn in {plot}")


class _Swept(NamedTuple):
    """What ``--sweep`` was given, and the name and values of the budget that it means."""

    text: str
    name: str
    values: list[int]


def _swept(sweep: str) -> _Swept:
    """Read it; raises `ConfigError`."""
    name, _, span = sweep.partition("=")
    ends = span.split("..")
    if name not in SWEPT or len(ends) != 2:
        raise ConfigError(
            f"--sweep is {sweep!r}; give {', '.join(SWEPT)} with two sizes, as "
            "gpu-memory=8GiB..80GiB"
        )
    try:
        first, last = (parse_size(end) for end in ends)
    except ConfigError as error:
        raise ConfigError(f"--sweep is {sweep!r}: {error}") from None
    if first >= last:
        raise ConfigError(f"--sweep is {sweep!r}; the first size must be the smaller one")
    return _Swept(sweep, name, [first + (last - first) * i // (POINTS - 1) for i in range(POINTS)])


def _table(
    request: PlanRequest, name: str, values: Sequence[int], found: Sequence[Solution | None]
) -> Table:
    table = Table(
        f"--{name}",
        *("tokens/s", "step", "bound by", "rows", "resident", "kept", "spilled"),
        *("offloaded", "on NVMe"),
        box=None,
        padding=(0, 2),
    )
    tokens = request.rows * request.seq_len
    for value, solution in zip(values, found, strict=True):
        if solution is None:
            table.add_row(format_size(value), "no plan fits")
            continue
        chosen = solution.plan
        table.add_row(
            format_size(value),
            f"{tokens / solution.seconds:,.0f}",
            f"{solution.seconds:.3g} s",
            max(solution.work, key=lambda lane: solution.work[lane]),
            *(str(chosen.micro_rows), str(len(chosen.resident)), str(chosen.kept)),
            *(str(chosen.spilled), str(chosen.offloaded), format_size(solution.nvme)),
        )
    return table


def _draw(
    plot: Path,
    request: PlanRequest,
    name: str,
    values: Sequence[int],
    found: Sequence[Solution | None],
) -> None:
    """Tokens per second over the budget; what does not fit is left out."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(
            "a sweep is drawn with matplotlib; pip install 'slideformer[view]'"
        ) from None
    tokens = request.rows * request.seq_len
    points = [
        (value / 2**30, tokens / solution.seconds)
        for value, solution in zip(values, found, strict=True)
        if solution is not None
    ]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(*zip(*points, strict=True), marker="o")
    axes.set(xlabel=f"--{name} in GiB", ylabel="tokens/s by the bound", ylim=(0, None))
    axes.grid(alpha=0.3)
    try:
        drawn = io.BytesIO()
        figure.savefig(drawn, dpi=150, format=plot.suffix[1:] or "png")
        write_whole(plot, drawn.getvalue())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{plot}: the sweep cannot be drawn there: {error}") from None
