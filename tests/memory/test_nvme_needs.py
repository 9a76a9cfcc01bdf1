"""The least state goes to NVMe that brings the host within its budget, and no more than may."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slideformer.graph.buffers import Tier
from slideformer.graph.errors import BudgetError
from slideformer.graph.plan import Budgets, Compute
from slideformer.memory import planner
from slideformer.memory.ledger import replay
from slideformer.memory.needs import PlanRequest, measure
from slideformer.memory.nvme_needs import less_on_nvme, most_on_nvme, nvme_nbytes, nvme_room
from slideformer.memory.planner import make_plan, plan_graphs
from tests.memory.test_planner import PROFILE, predict, workspace
from tests.support.specs import small_spec

SPEC = small_spec(layers=8)
ROOM = 1 << 30


def wanted(host: int, *, compute: Compute = Compute.BF16, nvme: int = ROOM) -> PlanRequest:
    """A request with little on the GPU: the least that any base takes there."""
    request = PlanRequest(
        spec=SPEC,
        rows=2,
        seq_len=8,
        compute=compute,
        budgets=Budgets(1 << 40, host, nvme),
        profile=PROFILE,
        workspace=workspace,
        predict=predict,
        micro_rows=1,
        window=2,
    )
    gpu = min(measure(request, base).gpu for base in planner._bases(request))
    return replace(request, budgets=replace(request.budgets, gpu=gpu))


def span(compute: Compute) -> tuple[int, int]:
    """Host bytes of a plan with as much on NVMe as there is, and with nothing there."""
    request = wanted(1 << 40, compute=compute)
    bases = list(planner._bases(request))
    fitting = [b for b in bases if measure(request, b).gpu <= request.budgets.gpu]
    least = min(measure(request, most_on_nvme(SPEC, base, ROOM)).host for base in fitting)
    return least, min(measure(request, base).host for base in fitting)


SPANS = {compute: span(compute) for compute in Compute}


@settings(max_examples=6)
@given(share=st.floats(0, 1), compute=st.sampled_from(Compute))
def test_as_little_as_fits_is_on_nvme(share: float, compute: Compute) -> None:
    least, most = SPANS[compute]
    assert least < most
    request = wanted(int(least + share * (most - least)), compute=compute)
    plan = make_plan(request)
    assert plan.peaks[Tier.PINNED] + plan.peaks[Tier.CPU] <= request.budgets.host
    for graph in plan_graphs(SPEC, plan):
        ledger = replay(graph)
        assert ledger.peak[Tier.NVME] <= plan.peaks.get(Tier.NVME, 0) <= ROOM
    less = less_on_nvme(SPEC, plan)
    if less is not None:
        assert measure(request, less).host > request.budgets.host
    if share == 1:
        assert less is None


def test_without_nvme_or_with_too_little_the_same_budget_is_refused() -> None:
    least, most = SPANS[Compute.BF16]
    host = (least + most) // 2
    plan = make_plan(wanted(host))
    needed = nvme_nbytes(SPEC, plan)
    assert needed
    make_plan(wanted(host, nvme=needed))
    for nvme in (0, needed - 1):
        with pytest.raises(BudgetError, match=r"the least that works is .*--cpu-memory"):
            make_plan(wanted(host, nvme=nvme))


def test_a_write_limit_is_kept_or_refused() -> None:
    least, most = SPANS[Compute.BF16]
    request = wanted((least + most) // 2)
    needed = nvme_nbytes(SPEC, make_plan(request))
    for limit, works in ((needed, True), (needed - 1, False)):
        budgets = replace(request.budgets, nvme_writes=limit)
        assert nvme_room(budgets) == limit
        if works:
            make_plan(replace(request, budgets=budgets))
        else:
            with pytest.raises(BudgetError, match="--nvme-write-limit"):
                make_plan(replace(request, budgets=budgets))
