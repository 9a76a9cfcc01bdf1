"""How much of the optimizer state goes to NVMe: the least that brings the host within its budget.

Moments come first, layer by layer, then the masters' lower halves. Every byte there is read and
written once a step, so fewer bytes are always faster.
"""

from __future__ import annotations

from dataclasses import replace

from slideformer.graph.model import ModelSpec
from slideformer.graph.plan import Budgets, Compute, MachineProfile, MemoryPlan
from slideformer.graph.step_nvme import EXTENT_ALIGNMENT, LO, MOMENTS, extent_nbytes


def nvme_nbytes(spec: ModelSpec, plan: MemoryPlan) -> int:
    """Bytes on NVMe, which are also those that a step reads there, and those that it writes.

    What fills the last page of each extent is left out.
    """
    layer = spec.layers[0].numel
    return layer * (8 * plan.nvme_moments + 2 * plan.nvme_lo)


def nvme_seconds(spec: ModelSpec, plan: MemoryPlan, profile: MachineProfile) -> list[float]:
    """Seconds of a step's reads and of its writes, for the bound."""
    nbytes = nvme_nbytes(spec, plan)
    return [nbytes / profile.nvme_read, nbytes / profile.nvme_write]


def nvme_room(budgets: Budgets) -> int:
    """Most bytes of state that may be there: by space, and by what a step may write."""
    return budgets.nvme if budgets.nvme_writes is None else min(budgets.nvme, budgets.nvme_writes)


def relieve(spec: ModelSpec, plan: MemoryPlan, deficit: int) -> MemoryPlan | None:
    """``plan`` with the least on NVMe that spares ``deficit`` bytes of host memory, or None.

    ``deficit`` is that of the plan with nothing on NVMe. Exact but for what fills pages.
    """
    bare = replace(plan, nvme_moments=0, nvme_lo=0)
    if deficit <= 0:
        return bare
    streamed = sum(unit.name not in plan.resident for unit in spec.layers)
    numel = spec.layers[0].numel
    chunk = min(plan.chunk_numel, numel)
    slots = plan.nvme_slots * extent_nbytes(MOMENTS, chunk)
    moments = -(-(deficit + slots) // (8 * numel))
    if moments <= streamed:
        return replace(bare, nvme_moments=moments)
    if plan.compute is not Compute.BF16:
        return None
    slots += plan.nvme_slots * extent_nbytes(LO, chunk) + 2 * numel
    lo = -(-(deficit + slots - 8 * numel * streamed) // (2 * numel))
    if 2 * numel * (lo - streamed) > 2 * EXTENT_ALIGNMENT * streamed:  # more than fills pages
        return None
    return replace(bare, nvme_moments=streamed, nvme_lo=min(lo, streamed))


def more_on_nvme(spec: ModelSpec, plan: MemoryPlan) -> MemoryPlan | None:
    """``plan`` with one layer more, if there is one: its moments, or then its lower halves."""
    streamed = sum(unit.name not in plan.resident for unit in spec.layers)
    if plan.nvme_moments < streamed:
        return replace(plan, nvme_moments=plan.nvme_moments + 1)
    if plan.nvme_lo < streamed and plan.compute is Compute.BF16:
        return replace(plan, nvme_lo=plan.nvme_lo + 1)
    return None


def less_on_nvme(plan: MemoryPlan) -> MemoryPlan | None:
    """``plan`` with one layer less, if there is one."""
    if plan.nvme_lo:
        return replace(plan, nvme_lo=plan.nvme_lo - 1)
    return replace(plan, nvme_moments=plan.nvme_moments - 1) if plan.nvme_moments else None


def most_on_nvme(spec: ModelSpec, plan: MemoryPlan, room: int) -> MemoryPlan:
    """``plan`` with as much on NVMe as ``room`` bytes hold."""
    numel = spec.layers[0].numel
    streamed = sum(unit.name not in plan.resident for unit in spec.layers)
    moments = min(streamed, room // (8 * numel))
    lo = min(streamed, (room - 8 * numel * moments) // (2 * numel)) if moments == streamed else 0
    if plan.compute is not Compute.BF16:
        lo = 0
    return replace(plan, nvme_moments=moments, nvme_lo=lo)
