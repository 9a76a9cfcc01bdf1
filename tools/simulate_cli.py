"""``slideformer simulate`` and ``slideformer policies``: predictions of steps, and of policies.

Everything printed is computed by ``slideformer.simulation``; nothing is measured.
"""

from __future__ import annotations

import sys
from typing import Any

import typer
from rich.table import Table

from slideformer.config import format_size
from slideformer.graph.buffers import Tier, host_bytes
from slideformer.graph.errors import PolicyError
from slideformer.graph.plan import UNLIMITED
from slideformer.graph.tasks import Lane
from slideformer.profiles import cached_machine
from slideformer.simulation import GraphTimeline, policy_names
from slideformer.simulation import simulate as simulate_graph
from slideformer.tools import step_flags as flags
from slideformer.tools.graph_cli import GraphFile, read_graph, stdout_console
from slideformer.tools.setting_flags import settings_as_flags

policies_app = typer.Typer(no_args_is_help=True, help="Scheduling policies.")

INSTANCES = 3
"""Simulated steps: the first fills the pipeline and is left out."""


@settings_as_flags(flags.STEP)
def simulate(
    model: flags.Model = None,
    shape: flags.Shape = None,
    machine: flags.MachineName = None,
    **settings: Any,
) -> None:
    """Predict a training step on a machine that need not be at hand."""
    if machine is None and cached_machine() is None:
        machine = flags.UNMEASURED
    step = flags.plan_step(model, shape, machine, **settings)
    timeline = simulate_graph(step.graph, step.profile, step.config.policy, INSTANCES)
    plan, seconds = step.plan, timeline.step_seconds
    console = stdout_console()
    title = step.machine.title if step.machine else step.profile.name
    console.print(
        f"{shape or model} on {title}: {plan.rows} × {plan.seq_len} tokens in "
        f"micro-batches of {plan.micro_rows} rows; {len(step.graph.tasks):,} tasks, "
        f"policy {step.config.policy}"
    )
    console.print(f"step {seconds:.3f} s, {plan.tokens / seconds:,.0f} tokens/s")
    lanes = Table("lane", "busy a step", "share", box=None, padding=(0, 2))
    busy = {lane: timeline.busy(lane) / INSTANCES for lane in timeline.utilisation()}
    for lane, each in sorted(busy.items(), key=lambda item: -item[1]):
        lanes.add_row(lane, f"{each:.3f} s", f"{each / seconds:.1%}")
    binding = max(busy, key=lambda lane: busy[lane])
    console.print(f"bound by {binding}")
    console.print(lanes)
    console.print(_exposed(timeline))
    console.print(_memory(step))


@policies_app.command()
def compare(
    file: GraphFile,
    machine: flags.MachineName = None,
) -> None:
    """Run a graph under every policy on the same machine, simulated, and print a table.

    One that fails, of another package perhaps, is named behind the table; the exit code is then 1.
    """
    known = flags.chosen_machine(machine)
    graph = read_graph(file)
    timelines, failed = {}, []
    for name in policy_names():
        try:
            timelines[name] = simulate_graph(graph, known.profile, name, INSTANCES)
        except PolicyError as error:
            failed.append(error)
    tiers = list(next(iter(timelines.values())).peaks())
    table = Table("policy", "step", "compute busy", "compute waits", box=None, padding=(0, 2))
    for tier in tiers:
        table.add_column(f"{tier} peak", justify="right")
    for name, timeline in sorted(timelines.items(), key=lambda item: item[1].step_seconds):
        waits = sum(timeline.exposed(first=1).values()) / (INSTANCES - 1)
        peaks = timeline.peaks()
        table.add_row(
            name,
            f"{timeline.step_seconds:.3f} s",
            f"{timeline.busy(Lane.COMPUTE) / INSTANCES:.3f} s",
            f"{waits:.3f} s",
            *(format_size(peaks[tier]) for tier in tiers),
        )
    console = stdout_console()
    console.print(f"{graph.name}: {len(graph.tasks):,} tasks on {known.title}")
    console.print(table)
    for each in failed:
        print(f"error: {' '.join(str(each).split())}", file=sys.stderr)
    if failed:
        raise typer.Exit(1)


def _exposed(timeline: GraphTimeline) -> str:
    causes = timeline.exposed(first=1)
    if not causes:
        return "compute never waits"
    parts = [
        f"{cause} {seconds / (INSTANCES - 1):.3f} s"
        for cause, seconds in sorted(causes.items(), key=lambda item: -item[1])
    ]
    total = sum(causes.values()) / (INSTANCES - 1)
    return f"compute waits {total:.3f} s a step: {', '.join(parts)}"


def _memory(step: flags.PlannedStep) -> Table:
    peaks = step.plan.peaks
    table = Table("memory", "predicted peak", "budget", box=None, padding=(0, 2))
    for tier, nbytes in peaks.items():
        table.add_row(tier, format_size(nbytes), _budget(step.budgets.gpu, tier is Tier.GPU))
    table.add_row("host", format_size(host_bytes(peaks)), _budget(step.budgets.host))
    return table


def _budget(nbytes: int | None, shown: bool = True) -> str:
    if nbytes == UNLIMITED:
        return "unlimited"
    if nbytes is None:
        return "of the host's" if shown else ""
    return format_size(nbytes) if shown else ""
