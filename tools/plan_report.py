"""Prints a memory plan for people: what lives where, predicted peaks against budgets, speed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from rich.console import Console
from rich.table import Table

from slideformer.config import EngineConfig, format_size
from slideformer.graph.buffers import Tier, host_bytes, whole_pages
from slideformer.graph.machines import Machine
from slideformer.graph.model import ModelSpec, UnitKind, UnitSpec
from slideformer.graph.plan import Budgets, MemoryPlan
from slideformer.graph.profile import MachineProfile
from slideformer.graph.state import state_nbytes
from slideformer.graph.step import compile_step
from slideformer.graph.step_nvme import boundaries_on_nvme
from slideformer.simulation import simulate


def print_plan(
    console: Console,
    config: EngineConfig,
    spec: ModelSpec,
    plan: MemoryPlan,
    budgets: Budgets,
    machine: Machine | None,
) -> None:
    """Print the plan of ``spec`` for ``config``, made for a generic machine without another."""
    profile = MachineProfile() if machine is None else machine.profile
    console.print(
        f"Plan: {spec.family}, {spec.param_count:,} parameters in {len(spec.layers)} layers"
        f"{_trained(spec)}; "
        f"steps of {plan.rows} × {plan.seq_len} tokens in {plan.compute.upper()}",
        soft_wrap=True,
    )
    console.print(_places(spec, plan))
    console.print(_peaks(config, plan, budgets))
    where = "a generic machine with a data-centre GPU, not for this one"
    console.print(
        f"Estimate for {where if machine is None else machine.title}: "
        f"{_duration(plan.step_seconds)} a step, {plan.tokens / plan.step_seconds:,.0f} tokens/s"
        f"{_deferral(config, spec, plan, profile)}",
        soft_wrap=True,
    )


def _deferral(
    config: EngineConfig, spec: ModelSpec, plan: MemoryPlan, profile: MachineProfile
) -> str:
    """What waiting for the norm costs, by the same prediction."""
    if not plan.deferred:
        return ""
    graph = compile_step(spec, replace(plan, deferred=False))
    seconds = simulate(graph, profile, config.policy, 3).step_seconds
    return f"; without clipping and skipping, the same plan takes {_duration(seconds)}"


def _trained(spec: ModelSpec) -> str:
    """How many parameters are trained, unless all are."""
    if spec.trained_count == spec.param_count:
        return ""
    return f", {spec.trained_count:,} of them trained"


def _places(spec: ModelSpec, plan: MemoryPlan) -> Table:
    table = Table.grid(padding=(0, 2))
    layer = max(unit.numel for unit in spec.layers) * plan.compute.nbytes
    streamed = [unit for unit in spec.units if unit.name not in plan.resident]
    stored = plan.peaks.get(Tier.NVME, 0)
    away = _stored_boundaries(spec, plan)
    at_rest = _at_rest(plan, (unit for unit in streamed if not unit.frozen)) - (stored - away)
    frozen = [unit for unit in streamed if unit.frozen]
    if any(unit.kind is UnitKind.LAYER for unit in streamed):
        table.add_row(
            "  weights", f"window of {plan.window} layers on the GPU, {format_size(layer)} each"
        )
    if plan.resident:
        table.add_row("  resident", _resident(spec, plan))
    if at_rest or stored:
        table.add_row("  masters, moments", f"{format_size(at_rest)} on the host, updated there")
    if frozen:
        table.add_row("  frozen", f"{format_size(_at_rest(plan, frozen))} on the host")
    if plan.snapshot:
        table.add_row("  checkpoints", "written from a snapshot in host memory, as steps go on")
    if stored:
        table.add_row("  on NVMe", _on_nvme(spec, plan, stored))
    table.add_row("  micro-batches", f"{plan.micro_batches} of {plan.micro_rows} rows")
    table.add_row("  boundaries", _boundaries(spec, plan))
    table.add_row("  activations", _activations(spec, plan))
    table.add_row(
        "  output matrix",
        f"{_count(plan.vocab_chunks, 'chunk')} of its vocabulary, "
        f"{min(plan.head_tile, plan.micro_tokens)} tokens at a time",
    )
    table.add_row("  gradients", _gradients(plan, [unit for unit in streamed if not unit.frozen]))
    return table


def _gradients(plan: MemoryPlan, units: Sequence[UnitSpec]) -> str:
    if plan.deferred:
        nbytes = plan.compute.nbytes * sum(unit.numel for unit in units)
        return (
            f"all wait until their norm is known, {format_size(nbytes)} of pinned memory; "
            "updates are deferred to the next forward"
        )
    return (
        f"{_count(len(plan.gradient_slot), 'chunk')} in {_count(plan.gradient_slots, 'slot')} "
        "of pinned memory until their update"
    )


def _resident(spec: ModelSpec, plan: MemoryPlan) -> str:
    """Which units are always on the GPU: layers counted, others named."""
    units = [unit for unit in spec.units if unit.name in plan.resident]
    layers = sum(unit.kind is UnitKind.LAYER for unit in units)
    adapters = sum(unit.kind is UnitKind.ADAPTER for unit in units)
    several = (UnitKind.LAYER, UnitKind.ADAPTER)
    names = [unit.name for unit in units if unit.kind not in several]
    names += [_count(layers, "layer")] if layers else []
    names += [f"adapters of {_count(adapters, 'layer')}"] if adapters else []
    nbytes = _at_rest(plan, units)
    return f"{', '.join(names)} on the GPU with masters and moments, {format_size(nbytes)}"


def _at_rest(plan: MemoryPlan, units: Iterable[UnitSpec]) -> int:
    """Bytes of weights, and of trained units masters and moments."""
    return sum(2 * unit.numel + state_nbytes(unit, plan) for unit in units)


def _on_nvme(spec: ModelSpec, plan: MemoryPlan, stored: int) -> str:
    counts = {
        "moments": plan.nvme_moments,
        "masters' lower halves": plan.nvme_lo,
        "boundaries": len(boundaries_on_nvme(spec, plan)),
        "weights": plan.nvme_hi,
    }
    parts = [f"{what} of {_count(number, 'layer')}" for what, number in counts.items() if number]
    return (
        f"{', '.join(parts)}: {format_size(stored)}; {format_size(stored)} written a step, "
        f"{format_size(1000 * stored)} in 1,000 steps"
    )


def _stored_boundaries(spec: ModelSpec, plan: MemoryPlan) -> int:
    """Bytes of the boundaries that wait on NVMe."""
    nbytes = whole_pages(plan.micro_tokens * spec.hidden * plan.compute.nbytes)
    return len(boundaries_on_nvme(spec, plan)) * plan.micro_batches * nbytes


def _boundaries(spec: ModelSpec, plan: MemoryPlan) -> str:
    layers = len(spec.layers)
    if not plan.offloaded:
        return "all on the GPU"
    nbytes = plan.tokens * spec.hidden * plan.compute.nbytes
    stored = len(boundaries_on_nvme(spec, plan))
    straight = ", straight from the GPU" if plan.nvme_direct else ""
    on_nvme = f", those of {stored} on NVMe{straight}" if stored else ""
    return (
        f"those of {plan.offloaded - stored} of {layers} layers wait in pinned memory{on_nvme}, "
        f"{format_size(nbytes)} each"
    )


def _activations(spec: ModelSpec, plan: MemoryPlan) -> str:
    again = len(spec.layers) - spec.lowest_trained - plan.kept - plan.spilled
    parts = [
        f"{_count(plan.kept, 'layer')} on the GPU" if plan.kept else "",
        f"{_count(plan.spilled, 'layer')} in pinned memory" if plan.spilled else "",
        f"{_count(again, 'layer')} computed again in backward" if again else "",
    ]
    return ", ".join(part for part in parts if part)


def _peaks(config: EngineConfig, plan: MemoryPlan, budgets: Budgets) -> Table:
    table = Table("memory", "predicted peak", "budget", box=None, padding=(0, 2))
    pinned = plan.peaks.get(Tier.PINNED, 0)
    free = {True: " (what is free)", False: ""}
    if budgets.gpu is None:
        table.add_row("gpu", format_size(plan.peaks[Tier.GPU]), "of the host's")
    else:
        table.add_row(
            "gpu",
            format_size(plan.peaks[Tier.GPU]),
            format_size(budgets.gpu) + free[config.gpu_memory is None],
        )
    table.add_row(
        "host",
        format_size(host_bytes(plan.peaks)),
        format_size(budgets.host) + free[config.cpu_memory is None],
    )
    table.add_row("  of it pinned", format_size(pinned), "")
    if budgets.nvme:
        table.add_row(
            "nvme",
            format_size(plan.peaks.get(Tier.NVME, 0)),
            format_size(budgets.nvme) + free[config.nvme_memory is None],
        )
    return table


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"
