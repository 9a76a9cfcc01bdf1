"""Plans keep their budgets, refusals tell the truth, and more memory never makes a plan slower."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slideformer.graph.buffers import HOST_TIERS, Tier
from slideformer.graph.errors import BudgetError
from slideformer.graph.graph import TaskGraph
from slideformer.graph.plan import Budgets, Compute, MachineProfile, MemoryPlan
from slideformer.memory import planner
from slideformer.memory.bound import step_bound
from slideformer.memory.layout import lay_out, places
from slideformer.memory.ledger import replay
from slideformer.memory.needs import (
    MIN_GRADIENT_SLOTS,
    PlanRequest,
    Prediction,
    host_bytes,
    measure,
    peaks,
)
from slideformer.memory.planner import WORTHWHILE, make_plan, plan_graphs
from slideformer.runtime.policies import make_policy
from slideformer.runtime.simulated import simulate
from tests.support.specs import draft_plans, freeze, small_spec, specs

MIB = 1 << 20
PROFILE = MachineProfile(gpu_overhead=3 * MIB, host_overhead=5 * MIB)
AMPLE = Budgets(1 << 40, 1 << 40)

some = settings(max_examples=12)


def predict(graph: TaskGraph) -> Prediction:
    """The middle one of three simulated steps."""
    timeline = simulate(graph, make_policy("earliest-deadline"), PROFILE, 3)
    seconds = (timeline.instance(2).stop - timeline.instance(0).stop) / 2
    return Prediction(seconds, {s.task: s.stopped for s in timeline.instance(1).spans})


def workspace(rows: int, vocab_rows: int, tile: int) -> int:
    """Temporaries that grow with the micro-batch and with the tile of logits."""
    return 100_000 * rows + 2 * vocab_rows * tile


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks a unit, as large models have them."""
    monkeypatch.setattr(planner, "CHUNK_NUMEL", 100_000)


@st.composite
def requests(draw: st.DrawFn) -> PlanRequest:
    """Models of some MiB on budgets from too small to ample."""
    spec = small_spec(
        layers=draw(st.integers(1, 5)),
        hidden=draw(st.integers(100, 200)),
        intermediate=draw(st.integers(100, 400)),
        heads=4,
        kv_heads=2,
        head_dim=32,
        vocab=draw(st.integers(50, 4000)),
        tied=draw(st.booleans()),
    )
    names = [unit.name for unit in spec.units][: draw(st.sampled_from([0, 0, 1, 3, -1, -2]))]
    spec = freeze(spec, [] if names == [u.name for u in spec.units] else names)
    request = PlanRequest(
        spec=spec,
        rows=draw(st.sampled_from([1, 2, 4, 6])),
        seq_len=draw(st.sampled_from([64, 257])),
        compute=draw(st.sampled_from(Compute)),
        budgets=AMPLE,
        profile=PROFILE,
        workspace=workspace,
        predict=predict,
        deferred=draw(st.booleans()),
    )
    least = [measure(request, base) for base in planner._bases(request)]
    gpu, host = min(sizes.gpu for sizes in least), min(sizes.host for sizes in least)
    shares = st.floats(0.8, 1.5)
    budgets = Budgets(int(gpu * draw(shares)), int(host * draw(shares)))
    return replace(request, budgets=budgets)


def plan_or_refusal(request: PlanRequest) -> MemoryPlan | str:
    """What the planner says; a plan is checked against its budgets by other means."""
    try:
        plan = make_plan(request)
    except BudgetError as error:
        return str(error)
    check_budgets(request, plan)
    return plan


def check_budgets(request: PlanRequest, plan: MemoryPlan) -> None:
    """Lay the places of all graphs out, and replay each graph against what the budgets leave."""
    graphs = plan_graphs(request.spec, plan)
    sizes = lay_out(places(graphs)).sizes
    gpu = sizes[Tier.GPU] + plan.workspace + PROFILE.gpu_overhead
    host = sum(sizes.get(tier, 0) for tier in HOST_TIERS) + PROFILE.host_overhead
    assert gpu <= request.budgets.gpu
    assert host <= request.budgets.host
    assert plan.peaks[Tier.GPU] == gpu
    assert host_bytes(plan.peaks) == host
    for graph in graphs:
        ledger = replay(graph, {Tier.GPU: request.budgets.gpu - plan.workspace})
        used = sum(ledger.peak[tier] for tier in HOST_TIERS)
        assert used + PROFILE.host_overhead <= request.budgets.host


def ways_out(refusal: str, budgets: Budgets) -> Iterator[Budgets]:
    """Budgets that a refusal promises to work."""
    told = refusal.partition("the least that works is ")[2].partition(". A smaller")[0]
    assert told
    for way in told.split(" or "):
        gpu = re.search(r"--gpu-memory (\d+)MiB", way)
        host = re.search(r"--cpu-memory (\d+)MiB", way)
        assert gpu or host
        yield Budgets(
            int(gpu[1]) * MIB if gpu else budgets.gpu, int(host[1]) * MIB if host else budgets.host
        )


def check_refusal(request: PlanRequest, told: str) -> None:
    """Every way out works, and with a MiB less it does not."""
    for budgets in ways_out(told, request.budgets):
        assert isinstance(plan_or_refusal(replace(request, budgets=budgets)), MemoryPlan)
        changed = [n for n in ("gpu", "host") if getattr(budgets, n) != getattr(request.budgets, n)]
        if len(changed) == 1:
            less = replace(budgets, **{changed[0]: getattr(budgets, changed[0]) - MIB})
            assert isinstance(plan_or_refusal(replace(request, budgets=less)), str), "not the least"


@some
@given(requests())
def test_a_plan_keeps_its_budgets_and_a_refusal_tells_the_truth(request: PlanRequest) -> None:
    told = plan_or_refusal(request)
    if isinstance(told, str):
        check_refusal(request, told)


@some
@given(requests(), st.sampled_from([1.0, 1.1, 1.6]), st.sampled_from([1.0, 1.1, 1.6]))
def test_more_memory_never_makes_a_plan_slower(
    request: PlanRequest, gpu: float, host: float
) -> None:
    first = plan_or_refusal(request)
    if isinstance(first, str):
        return
    budgets = Budgets(int(request.budgets.gpu * gpu), int(request.budgets.host * host))
    second = plan_or_refusal(replace(request, budgets=budgets))
    assert isinstance(second, MemoryPlan)
    before, after = (step_bound(request.spec, plan, PROFILE) for plan in (first, second))
    assert after <= before * (1 + WORTHWHILE)


def request_for(**changes: object) -> PlanRequest:
    """A model of three layers on ample budgets."""
    request = PlanRequest(
        spec=small_spec(hidden=128, intermediate=300, heads=4, kv_heads=2, head_dim=32, vocab=999),
        rows=4,
        seq_len=64,
        compute=Compute.BF16,
        budgets=AMPLE,
        profile=PROFILE,
        workspace=workspace,
        predict=predict,
    )
    return replace(request, **changes)  # type: ignore[arg-type]


def test_what_is_fixed_is_not_chosen() -> None:
    plan = make_plan(request_for(micro_rows=2, window=2))
    assert (plan.micro_rows, plan.window) == (2, 2)


def test_ample_budgets_offload_nothing() -> None:
    plan = make_plan(request_for())
    assert plan.offloaded == 0
    assert plan.micro_batches == 1
    assert plan.vocab_chunks == 1


def test_with_fp32_nothing_is_resident() -> None:
    assert make_plan(request_for(compute=Compute.FP32)).resident == frozenset()


def test_a_tight_gpu_budget_offloads_boundaries() -> None:
    request = request_for(micro_rows=4, window=2)
    least = min(measure(request, base).gpu for base in planner._bases(request))
    plan = make_plan(replace(request, budgets=Budgets(least, AMPLE.host)))
    assert plan.offloaded > 0


def test_a_tight_host_budget_leaves_few_gradient_slots_and_they_are_shared() -> None:
    request = request_for(compute=Compute.FP32)
    plan = make_plan(request)
    parked = len(plan.gradient_slot)
    assert plan.gradient_slots == parked, "with ample memory each has a place of its own"
    sizes = measure(request, replace(plan, boundary_slots=None))
    tight = make_plan(replace(request, budgets=Budgets(AMPLE.gpu, sizes.host + sizes.gradient)))
    assert tight.gradient_slots == MIN_GRADIENT_SLOTS + 1
    assert set(tight.gradient_slot) == set(range(tight.gradient_slots))
    assert len(tight.gradient_slot) == parked


def test_each_gradient_takes_the_slot_that_is_free_first() -> None:
    request = request_for(compute=Compute.FP32)
    ample = make_plan(request)
    sizes = measure(request, replace(ample, boundary_slots=None))
    tight = replace(request, budgets=Budgets(AMPLE.gpu, sizes.host))
    plan = make_plan(tight)
    graph = plan_graphs(request.spec, replace(plan, gradient_slots=0, gradient_slot=()))[0]
    stops = predict(graph).stops
    names = [name for name in graph.buffers if name.startswith("gh.")]
    free = dict.fromkeys(range(plan.gradient_slots), 0.0)
    for name, slot in zip(names, plan.gradient_slot, strict=True):
        assert free[slot] == min(free.values())
        free[slot] = stops[name.replace("gh.", "update.", 1)]


@pytest.mark.parametrize("offloaded", range(1, 6))
@pytest.mark.parametrize("short", ["gpu", "host"])
def test_a_refusal_counts_with_some_of_the_boundaries_offloaded(offloaded: int, short: str) -> None:
    """The least of one budget is where the other one is just used up."""
    spec = small_spec(
        layers=6, hidden=200, intermediate=100, heads=4, kv_heads=2, head_dim=16, vocab=50
    )
    request = request_for(spec=spec, rows=8, seq_len=512, micro_rows=8, window=2)
    base = min(planner._bases(request), key=lambda plan: measure(request, plan).gpu)
    sizes = measure(request, replace(base, offloaded=offloaded))
    budgets = Budgets(sizes.gpu, sizes.host)
    request = replace(request, budgets=replace(budgets, **{short: getattr(budgets, short) - MIB}))
    told = plan_or_refusal(request)
    assert isinstance(told, str)
    check_refusal(request, told)
    flag, need = {"gpu": ("gpu", sizes.gpu), "host": ("cpu", sizes.host)}[short]
    assert f"--{flag}-memory {-(-need // MIB)}MiB" in told


@st.composite
def placed(draw: st.DrawFn) -> tuple[PlanRequest, MemoryPlan]:
    """Any placement of a small model."""
    spec = draw(specs())
    plan = draw(draft_plans(spec))
    return request_for(spec=spec, compute=plan.compute, rows=plan.rows, seq_len=plan.seq_len), plan


@given(placed(), st.integers(1, 9))
def test_measured_needs_cover_every_choice_of_slots(
    case: tuple[PlanRequest, MemoryPlan], slots: int
) -> None:
    request, plan = case
    sizes = measure(request, plan)
    parked = sum(n.startswith("gh.") for n in plan_graphs(request.spec, plan)[0].buffers)
    assert sizes.gradients == parked
    least = min(MIN_GRADIENT_SLOTS, parked)
    count = max(least, min(slots, parked))
    if plan.deferred:  # then all of them are parked, and counted
        least = count = parked
    plan = replace(plan, boundary_slots=sizes.boundaries, gradient_slots=count)
    plan = replace(plan, gradient_slot=tuple(i % count for i in range(parked)))
    needs = peaks(request, plan)
    assert needs[Tier.GPU] == sizes.gpu
    assert host_bytes(needs) <= sizes.host + (count - least) * sizes.gradient
    if parked and not plan.deferred:  # in one slot, all take as much as the largest, to the byte
        one = replace(plan, gradient_slots=1, gradient_slot=(0,) * parked)
        assert host_bytes(peaks(request, one)) == sizes.host - (least - 1) * sizes.gradient
    together = lay_out(places(plan_graphs(request.spec, plan))).sizes
    assert together[Tier.GPU] + plan.workspace + PROFILE.gpu_overhead == needs[Tier.GPU]


def test_a_refusal_says_what_was_asked_for() -> None:
    with pytest.raises(BudgetError) as raised:
        make_plan(request_for(budgets=Budgets(4 * MIB, 6 * MIB)))
    message = str(raised.value)
    assert message.startswith("no plan fits 4 MiB of GPU memory and 6 MiB of host memory")
    assert "4 rows of 64 tokens" in message
    assert "--gpu-memory" in message
    assert "with --cpu-memory" in message, "neither alone would do"
