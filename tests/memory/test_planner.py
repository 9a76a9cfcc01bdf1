"""What is fixed is not chosen, budgets are spent as meant, and refusals say what was asked for."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slideformer.graph.buffers import Tier, host_bytes
from slideformer.graph.errors import BudgetError
from slideformer.graph.plan import Budgets, Compute, MemoryPlan
from slideformer.graph.step import compile_step, park_gradients
from slideformer.memory import lattice as lattice_module
from slideformer.memory.needs import MIN_GRADIENT_SLOTS, peaks
from slideformer.memory.planner import CAUTION, CONTENDERS, STEPS, make_plan, plan_graphs
from slideformer.memory.request import PlanRequest
from slideformer.memory.solver import NEAR, Lattice, Solution
from tests.support.requests import AMPLE, MIB, PROFILE, UNBOUNDED, predict, request_for
from tests.support.specs import small_spec


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks a unit, as large models have them."""
    monkeypatch.setattr(lattice_module, "CHUNK_NUMEL", 100_000)


def solved(request: PlanRequest) -> Solution:
    """What the solver finds."""
    found = Lattice(request).solve(request.budgets)
    assert found is not None
    return found


def test_what_is_fixed_is_not_chosen() -> None:
    plan = make_plan(request_for(micro_rows=2, window=2))
    assert (plan.micro_rows, plan.window) == (2, 2)


def test_ample_budgets_keep_everything_on_the_gpu() -> None:
    spec = small_spec(
        hidden=2048, intermediate=8192, heads=16, kv_heads=16, head_dim=128, vocab=32_000
    )
    plan = make_plan(request_for(spec=spec, seq_len=4096))
    assert plan.resident >= {unit.name for unit in spec.layers}
    assert (plan.kept, plan.spilled, plan.offloaded) == (3, 0, 0)
    assert (plan.micro_batches, plan.vocab_chunks) == (1, 1)


def test_with_fp32_nothing_is_resident() -> None:
    assert make_plan(request_for(compute=Compute.FP32)).resident == frozenset()


def test_a_tight_gpu_budget_offloads_boundaries() -> None:
    request = request_for(micro_rows=4, window=2)
    least = Lattice(request).least_gpu(AMPLE)
    assert least is not None
    plan = make_plan(replace(request, budgets=replace(AMPLE, gpu=least)))
    assert plan.offloaded > 0
    assert plan.peaks[Tier.GPU] == least


def test_chunks_are_halved_where_whole_ones_do_not_fit() -> None:
    spec = small_spec(hidden=128, intermediate=300, heads=4, kv_heads=4, head_dim=32)
    request = request_for(spec=spec)
    least = Lattice(request).least_gpu(AMPLE)
    assert least is not None
    tight = make_plan(replace(request, budgets=replace(AMPLE, gpu=least)))
    assert make_plan(request).chunk_numel == 100_000
    assert tight.chunk_numel == 50_000


def test_no_plan_is_simulated_with_halved_chunks_that_fits_with_whole_ones() -> None:
    spec = small_spec(hidden=128, intermediate=300, heads=4, kv_heads=4, head_dim=32)
    request = request_for(spec=spec)
    lattice = Lattice(request)
    found = lattice.contenders(AMPLE, solved(request), 1000)
    assert len(found) > 1
    assert all(each.plan.chunk_numel == 100_000 for each in found)


@settings(max_examples=5)
@given(share=st.floats(0, 1))
def test_of_plans_that_the_bound_cannot_tell_apart_the_fastest_is_taken(share: float) -> None:
    """In simulation, on a host that is somewhat slower than assumed."""
    request = request_for(spec=small_spec(layers=8), rows=8)
    lattice = Lattice(request)
    least, most = lattice.least_gpu(AMPLE), make_plan(request).peaks[Tier.GPU]
    assert least is not None
    budgets = replace(AMPLE, gpu=int(least + share * (most - least)))
    request = replace(request, budgets=budgets)
    best = lattice.solve(budgets)
    assert best is not None
    contenders = lattice.contenders(budgets, best, CONTENDERS)
    assert contenders[0] == best
    slower = replace(PROFILE, update=CAUTION * PROFILE.update)

    def seconds(plan: MemoryPlan) -> float:
        return predict(compile_step(request.spec, plan), slower, STEPS).seconds

    drafts = [
        replace(s.plan, gradient_slots=s.gradients, gradient_slot=tuple(range(s.gradients)))
        for s in contenders
    ]
    for draft, solution in zip(drafts, contenders, strict=True):
        assert peaks(request, draft)[Tier.GPU] <= budgets.gpu
        assert solution.seconds <= best.seconds * (1 + NEAR)
    chosen = make_plan(request)
    assert seconds(chosen) == min(map(seconds, drafts))


def tight(request: PlanRequest, slots: int) -> PlanRequest:
    """The request with host memory for what its plan needs, and for so many gradients more."""
    found = solved(request)
    gradients = found.gradient * slots
    host = request.budgets.host - found.spare_host + gradients
    return replace(request, budgets=replace(request.budgets, host=host))


def test_a_tight_host_budget_leaves_few_gradient_slots_and_they_are_shared() -> None:
    request = request_for(compute=Compute.FP32)
    plan = make_plan(request)
    parked = len(plan.gradient_slot)
    assert plan.gradient_slots == parked, "with ample memory each has a place of its own"
    assert plan.gradient_slot == tuple(range(parked))
    few = make_plan(tight(request, 1))
    assert few.gradient_slots == MIN_GRADIENT_SLOTS + 1
    assert set(few.gradient_slot) == set(range(few.gradient_slots))
    assert len(few.gradient_slot) == parked


def test_each_gradient_takes_the_slot_that_is_free_first() -> None:
    request = tight(request_for(compute=Compute.FP32), 0)
    plan = make_plan(request)
    graph = plan_graphs(request.spec, replace(plan, gradient_slots=0, gradient_slot=()))[0]
    stops = predict(graph, PROFILE, 1).stops
    names = [name for name in graph.buffers if name.startswith("gh.")]
    free = dict.fromkeys(range(plan.gradient_slots), 0.0)
    for name, slot in zip(names, plan.gradient_slot, strict=True):
        assert free[slot] == min(free.values())
        free[slot] = stops[name.replace("gh.", "update.", 1)]


def test_gradients_are_parked_in_a_graph_as_the_compiler_would() -> None:
    request = tight(request_for(compute=Compute.FP32), 1)
    plan = make_plan(request)
    draft = compile_step(request.spec, replace(plan, gradient_slots=0, gradient_slot=()))
    assert park_gradients(draft, plan.gradient_slot) == compile_step(request.spec, plan)


def starved(*, nvme: int = UNBOUNDED, compute: Compute = Compute.BF16) -> tuple[PlanRequest, int]:
    """A model that is streamed through a small GPU, and host bytes with nothing on NVMe."""
    request = request_for(spec=small_spec(layers=8), rows=2, seq_len=8, compute=compute)
    lattice = Lattice(request)
    gpu = lattice.least_gpu(AMPLE)
    assert gpu is not None
    budgets = Budgets(gpu, UNBOUNDED, nvme)
    host = lattice.least_host(replace(budgets, nvme=0))
    assert host is not None
    return replace(request, budgets=budgets), host


@settings(max_examples=8)
@given(share=st.floats(0, 1), compute=st.sampled_from(Compute))
def test_as_little_as_fits_is_on_nvme(share: float, compute: Compute) -> None:
    request, most = starved(compute=compute)
    lattice = Lattice(request)
    least = lattice.least_host(request.budgets)
    assert least is not None
    assert least < most
    budgets = replace(request.budgets, host=int(least + share * (most - least)))
    plan = make_plan(replace(request, budgets=budgets))
    assert plan.peaks.get(Tier.NVME, 0) == lattice.least_nvme(budgets)
    if share == 1:
        assert plan.nvme_moments == 0
    elif share == 0:
        assert plan.nvme_moments == 8
        assert plan.nvme_lo == (8 if compute is Compute.BF16 else 0)


def test_a_write_limit_is_kept_or_refused_by_name() -> None:
    request, most = starved()
    least = Lattice(request).least_host(request.budgets)
    assert least is not None
    budgets = replace(request.budgets, host=(least + most) // 2)
    needed = make_plan(replace(request, budgets=budgets)).peaks[Tier.NVME]
    make_plan(replace(request, budgets=replace(budgets, nvme_writes=needed)))
    with pytest.raises(BudgetError, match=r"or --nvme-write-limit \d+MiB\."):
        make_plan(replace(request, budgets=replace(budgets, nvme_writes=needed - 1)))
    with pytest.raises(BudgetError, match=r"or --nvme-memory \d+MiB\."):
        make_plan(replace(request, budgets=replace(budgets, nvme=needed - 1)))


def test_without_a_gpu_one_budget_is_for_both_and_the_least_of_it_works() -> None:
    request = request_for(budgets=Budgets(None, MIB))
    with pytest.raises(BudgetError) as raised:
        make_plan(request)
    message = str(raised.value)
    assert message.startswith("no plan fits 1 MiB of host memory for 4 rows")
    assert "--gpu-memory" not in message
    named = re.search(r"the least that works is --cpu-memory (\d+)MiB\.", message)
    assert named
    host = int(named[1]) * MIB
    plan = make_plan(replace(request, budgets=Budgets(None, host)))
    assert isinstance(plan, MemoryPlan)
    assert sum(plan.peaks.values()) <= host
    with pytest.raises(BudgetError):
        make_plan(replace(request, budgets=Budgets(None, host - MIB)))


def test_a_refusal_says_what_was_asked_for_and_what_would_help() -> None:
    with pytest.raises(BudgetError) as raised:
        make_plan(request_for(budgets=Budgets(4 * MIB, 6 * MIB), micro_rows=2))
    message = str(raised.value)
    assert message.startswith("no plan fits 4 MiB of GPU memory and 6 MiB of host memory")
    assert "4 rows of 64 tokens" in message
    assert "--gpu-memory" in message
    assert "with --cpu-memory" in message, "neither alone would do"
    assert "A smaller --batch-size, --accumulate, --seq-len or --micro-batch needs less." in message
    assert "--nvme FOLDER" in message
    assert "--max-grad-norm" not in message
    with pytest.raises(BudgetError, match="Without --max-grad-norm and --skip-nonfinite, grad"):
        make_plan(request_for(budgets=Budgets(4 * MIB, 6 * MIB), deferred=True))


@pytest.mark.parametrize("one_budget", [False, True])
def test_a_snapshot_is_planned_where_the_host_has_room_left(one_budget: bool) -> None:
    gpu = None if one_budget else AMPLE.gpu
    request = request_for(budgets=Budgets(gpu, AMPLE.host))
    plan = make_plan(request)
    assert not plan.snapshot, "nobody writes checkpoints"
    request = replace(request, checkpoints=True)
    roomy = make_plan(request)
    assert roomy.snapshot
    assert replace(roomy, snapshot=False, peaks=plan.peaks) == plan, "nothing else is given up"
    state = sum(12 * unit.numel for unit in request.spec.units)
    used = host_bytes(roomy.peaks) + (roomy.peaks[Tier.GPU] if one_budget else 0)
    without = host_bytes(plan.peaks) + (plan.peaks[Tier.GPU] if one_budget else 0)
    assert used - without >= state
    exact = replace(request, budgets=Budgets(gpu, used))
    assert make_plan(exact).snapshot
    tight = make_plan(replace(request, budgets=Budgets(gpu, without)))
    assert not tight.snapshot
