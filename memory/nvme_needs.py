"""How much goes to NVMe: the least that brings the host within its budget.

Moments come first, layer by layer, then the masters' lower halves, then boundaries, then the upper
halves. Every byte there is written and read once a step, upper halves are read twice, so fewer
bytes are always faster.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from slideformer.graph.model import ModelSpec
from slideformer.graph.plan import Budgets, Compute, MachineProfile, MemoryPlan
from slideformer.graph.step_nvme import (
    EXTENT_ALIGNMENT,
    HI,
    LO,
    MOMENTS,
    extent_nbytes,
    may_store_boundaries,
    whole_pages,
    with_streamed_state,
)


class Share(NamedTuple):
    """One kind of thing that may lie on NVMe, for some of the layers.

    ``field`` of the plan counts the layers, ``most`` is the most that it may be; each spares the
    host ``nbytes``, and the first one costs ``fixed`` bytes of slots there.
    """

    field: str
    most: int
    nbytes: int
    fixed: int

    @property
    def worthwhile(self) -> bool:
        """Whether all of it spares more than its slots take."""
        return self.most * self.nbytes > self.fixed


def shares(spec: ModelSpec, plan: MemoryPlan) -> Iterator[Share]:
    """What may go to NVMe, in the order in which it goes, each only when all before it is there."""
    numel = spec.layers[0].numel
    chunk = min(plan.chunk_numel, numel)
    streamed = len(with_streamed_state(spec, plan))
    half, saved, slots = 2 * numel, 2 * numel, plan.nvme_slots
    halves = plan.compute is Compute.BF16  # FP32 compute reads both in every pass
    yield Share("nvme_moments", streamed, 8 * numel, slots * extent_nbytes(MOMENTS, chunk))
    if halves:
        yield Share("nvme_lo", streamed, half, slots * extent_nbytes(LO, chunk) + saved)
    boundary = whole_pages(plan.micro_tokens * spec.hidden * plan.compute.nbytes)
    others = len(may_store_boundaries(spec, plan))
    yield Share("nvme_boundaries", others, boundary * plan.micro_batches, slots * boundary)
    if halves:
        yield Share("nvme_hi", streamed, half, 2 * slots * extent_nbytes(HI, chunk) + saved)


def nvme_nbytes(spec: ModelSpec, plan: MemoryPlan) -> int:
    """Bytes on NVMe, which are also those that a step writes there.

    What fills the last page of each extent of state is left out.
    """
    return sum(share.nbytes * _count(plan, share) for share in shares(spec, plan))


def nvme_read_nbytes(spec: ModelSpec, plan: MemoryPlan) -> int:
    """Bytes that a step reads from NVMe: upper halves in forward and in backward.

    Deferred updates read them once more.
    """
    again = 4 if plan.deferred else 2
    return nvme_nbytes(spec, plan) + again * spec.layers[0].numel * plan.nvme_hi


def nvme_seconds(spec: ModelSpec, plan: MemoryPlan, profile: MachineProfile) -> list[float]:
    """Seconds of a step's reads and of its writes, for the bound."""
    return [
        nvme_read_nbytes(spec, plan) / profile.nvme_read,
        nvme_nbytes(spec, plan) / profile.nvme_write,
    ]


def nvme_room(budgets: Budgets) -> int:
    """Most bytes that may be there: by space, and by what a step may write."""
    return budgets.nvme if budgets.nvme_writes is None else min(budgets.nvme, budgets.nvme_writes)


def relieve(spec: ModelSpec, plan: MemoryPlan, deficit: int) -> MemoryPlan | None:
    """``plan`` with the least on NVMe that spares ``deficit`` bytes of host memory, or None.

    ``deficit`` is that of the plan with nothing on NVMe. Exact but for what fills pages.
    """
    plan = nothing_on_nvme(plan)
    for share in shares(spec, plan):
        if deficit <= 0:
            break
        if share.worthwhile:
            count = min(share.most, -(-(deficit + share.fixed) // share.nbytes))
            plan = _with(plan, share, count)
            deficit += share.fixed - count * share.nbytes
    pages = 2 * EXTENT_ALIGNMENT * len(spec.layers)
    return plan if deficit <= pages else None


def nothing_on_nvme(plan: MemoryPlan) -> MemoryPlan:
    """``plan`` with everything in memory."""
    return replace(plan, nvme_moments=0, nvme_lo=0, nvme_boundaries=0, nvme_hi=0)


def more_on_nvme(spec: ModelSpec, plan: MemoryPlan) -> MemoryPlan | None:
    """``plan`` with one layer's share more, in the order of `shares`, if there is one."""
    for share in shares(spec, plan):
        if _count(plan, share) < share.most:
            return _with(plan, share, _count(plan, share) + 1)
    return None


def less_on_nvme(spec: ModelSpec, plan: MemoryPlan) -> MemoryPlan | None:
    """``plan`` with one layer's share less, if there is one."""
    for share in reversed(list(shares(spec, plan))):
        if _count(plan, share):
            return _with(plan, share, _count(plan, share) - 1)
    return None


def most_on_nvme(spec: ModelSpec, plan: MemoryPlan, room: int) -> MemoryPlan:
    """``plan`` with as much on NVMe as ``room`` bytes hold."""
    plan = nothing_on_nvme(plan)
    for share in shares(spec, plan):
        count = min(share.most, room // share.nbytes)
        if share.worthwhile and count * share.nbytes > share.fixed:
            plan = _with(plan, share, count)
            room -= count * share.nbytes
        if share.worthwhile and count < share.most:
            break
    return plan


def _count(plan: MemoryPlan, share: Share) -> int:
    """How many layers' shares there are; a count beyond what there may be stands for all."""
    return min(int(getattr(plan, share.field)), share.most)


def _with(plan: MemoryPlan, share: Share, count: int) -> MemoryPlan:
    changes: dict[str, Any] = {share.field: count}
    return replace(plan, **changes)
