"""Laws of planning, by name. Each is checked by means that share no code with the solver.

That every feasible plan of one numerics trains to the same bits is the matter of
``tests/slideformer/test_engine_invariance.py``.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slideformer.graph.buffers import HOST_TIERS, Tier, host_bytes
from slideformer.graph.errors import BudgetError
from slideformer.graph.graph import TaskGraph
from slideformer.graph.model import ModelSpec
from slideformer.graph.plan import Budgets, Compute, MemoryPlan
from slideformer.graph.step import footprint
from slideformer.memory import lattice as lattice_module
from slideformer.memory.bound import Bound, Seconds
from slideformer.memory.lattice import Counts, bases
from slideformer.memory.layout import lay_out, places
from slideformer.memory.ledger import replay
from slideformer.memory.needs import MIN_GRADIENT_SLOTS
from slideformer.memory.nvme_needs import Sizes
from slideformer.memory.planner import make_plan, plan_graphs
from slideformer.memory.request import PlanRequest
from slideformer.memory.solver import Lattice, on_grid
from tests.support.requests import AMPLE, MIB, PROFILE, UNBOUNDED, request_for, requests
from tests.support.specs import small_spec


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks a unit, as large models have them."""
    monkeypatch.setattr(lattice_module, "CHUNK_NUMEL", 20_000)


@st.composite
def budgeted(draw: st.DrawFn) -> PlanRequest:
    """Requests on budgets from too small to ample, with and without GPU, NVMe, a write limit."""
    request = draw(requests())
    every = Lattice(request)
    gpu, host = every.least_gpu(AMPLE), every.least_host(AMPLE)
    assert gpu is not None
    assert host is not None
    share = st.floats(0.9, 1.6)
    nvme = draw(st.sampled_from([0, 200_000, UNBOUNDED]))
    budgets = Budgets(
        gpu=draw(st.sampled_from([None, int(gpu * draw(share))])),
        host=int(host * draw(share)),
        nvme=nvme,
        nvme_writes=draw(st.sampled_from([None, 300_000])) if nvme else None,
    )
    return replace(request, budgets=budgets)


def planned(request: PlanRequest) -> MemoryPlan | str:
    """The plan, or what the refusal says."""
    try:
        return make_plan(request)
    except BudgetError as error:
        return str(error)


@settings(max_examples=25)
@given(budgeted())
def test_law_no_replay_of_a_planned_graph_exceeds_a_budget(request: PlanRequest) -> None:
    plan = planned(request)
    if isinstance(plan, str):
        return
    budgets, graphs = request.budgets, plan_graphs(request.spec, plan)
    arenas = lay_out(places(graphs)).sizes
    gpu = arenas[Tier.GPU] + plan.workspace + PROFILE.gpu_overhead
    host = sum(arenas.get(tier, 0) for tier in HOST_TIERS) + PROFILE.host_overhead
    assert (plan.peaks[Tier.GPU], host_bytes(plan.peaks)) == (gpu, host)
    for graph in graphs:
        peak = replay(graph).peak
        gpu = max(gpu, peak[Tier.GPU] + plan.workspace + PROFILE.gpu_overhead)
        host = max(host, sum(peak[tier] for tier in HOST_TIERS) + PROFILE.host_overhead)
        assert peak[Tier.NVME] <= budgets.nvme
        written = sum(t.cost.nbytes for t in graph.tasks if t.name.startswith("write."))
        assert budgets.nvme_writes is None or written <= budgets.nvme_writes
    if budgets.gpu is None:
        assert gpu + host <= budgets.host
    else:
        assert gpu <= budgets.gpu
        assert host <= budgets.host


@settings(max_examples=25)
@given(budgeted())
def test_law_live_buffers_never_share_bytes(request: PlanRequest) -> None:
    plan = planned(request)
    if isinstance(plan, str):
        return
    for graph in plan_graphs(request.spec, plan):
        for place, lives in _lives(graph).items():
            for i, one in enumerate(lives):
                for other in lives[:i]:
                    apart = one.stop <= other.start or other.stop <= one.start
                    assert apart or one.last < other.first or other.last < one.first, place


class Life(NamedTuple):
    """Bytes ``[start, stop)`` of a place hold something from one task to another."""

    start: int
    stop: int
    first: int
    last: int


def _lives(graph: TaskGraph) -> dict[str, list[Life]]:
    accesses: dict[str, list[int]] = {}
    for position, task in enumerate(graph.tasks):
        for name in (*task.reads, *task.writes):
            accesses.setdefault(name, []).append(position)
    found: dict[str, list[Life]] = {}
    for buffer in graph.buffers.values():
        at = accesses.get(buffer.name, [])
        if buffer.carried:
            at = [-1, len(graph.tasks)]
        if at:
            life = Life(buffer.offset, buffer.stop, min(at), max(at))
            found.setdefault(buffer.place, []).append(life)
    return found


@settings(max_examples=25)
@given(budgeted(), st.data())
def test_law_more_of_a_budget_never_raises_the_objective(
    request: PlanRequest, data: st.DataObject
) -> None:
    every = Lattice(request)
    first = every.solve(request.budgets)
    more = {
        name: value + data.draw(st.sampled_from([0, 4096, 100_000, MIB, 10 * MIB]), label=name)
        for name in ("gpu", "host", "nvme", "nvme_writes")
        if (value := getattr(request.budgets, name)) is not None
    }
    second = every.solve(replace(request.budgets, **more))
    if first is not None:
        assert second is not None
        assert second.rank[0] <= first.rank[0]


class Tried(NamedTuple):
    """A plan, its rank, and the bytes it needs: GPU, host, NVMe."""

    plan: MemoryPlan
    rank: tuple[int, ...]
    gpu: int
    host: int
    nvme: int

    def fits(self, budgets: Budgets) -> bool:
        """Whether it may be chosen."""
        if self.nvme > budgets.nvme:
            return False
        if budgets.nvme_writes is not None and self.nvme > budgets.nvme_writes:
            return False
        if budgets.gpu is None:  # then offloading spares nothing
            few = 0 if self.plan.resident else 1
            return self.plan.offloaded == few and self.gpu + self.host <= budgets.host
        return self.gpu <= budgets.gpu and self.host <= budgets.host


def everything(request: PlanRequest) -> list[Tried]:
    """Every plan of the lattice, its needs taken from the places of its graphs."""
    spec, layers = request.spec, len(request.spec.layers)
    units = ["embed", *(unit.name for unit in spec.layers)]
    resident = range(layers + 2 if request.compute is Compute.BF16 else 1)
    upto = range(layers + 1)
    found = []
    for base, r, k, s in product(bases(request), resident, upto, upto):
        if k + s > layers:
            continue
        memory = None  # with everything where it would be best
        for offloaded in range(0 if r else 1, layers + 1):
            for stored in chain(request, layers - max(r - 1, 0), max(offloaded - 1, 0)):
                plan = replace(
                    base,
                    resident=frozenset(units[:r]),
                    kept=k,
                    spilled=s,
                    offloaded=offloaded,
                    nvme_moments=stored[0],
                    nvme_lo=stored[1],
                    nvme_boundaries=stored[2],
                    nvme_hi=stored[3],
                )
                gpu, host, nvme, seconds = _measure(request, plan)
                memory = gpu + host if memory is None else memory
                rank = (
                    int(on_grid(seconds)),
                    int(on_grid(np.array(max(nvme, 1)))),
                    base.micro_batches,
                    -base.chunk_numel,
                    memory,
                    offloaded,
                )
                found.append(Tried(plan, rank, gpu, host, nvme))
    return found


def chain(request: PlanRequest, streamed: int, boundaries: int) -> Iterator[tuple[int, ...]]:
    """Layers with moments, lower halves, boundaries and upper halves on NVMe, in order."""
    halves = streamed if request.compute is Compute.BF16 else 0
    most = (streamed, halves, boundaries, halves)
    yield (0, 0, 0, 0)
    for kind, limit in enumerate(most):
        for count in range(1, limit + 1):
            yield (*most[:kind], count, *(0,) * (3 - kind))


def _measure(request: PlanRequest, plan: MemoryPlan) -> tuple[int, int, int, Seconds]:
    """Bytes of GPU, host and NVMe, with spare boundaries and the fewest gradient slots; seconds."""
    wanted = footprint(request.spec, plan)
    sizes = lay_out(wanted).sizes
    boundary = next(_aligned(n) for name, (_, n) in wanted.items() if name.startswith("x."))
    parked = [_aligned(n) for name, (_, n) in wanted.items() if name.startswith("gh.")]
    gpu = sizes[Tier.GPU] + (6 if plan.spilled else 2) * boundary
    gpu += plan.workspace + PROFILE.gpu_overhead
    host = sum(sizes[tier] for tier in HOST_TIERS) + PROFILE.host_overhead
    if not plan.deferred:
        host -= sum(parked) - min(MIN_GRADIENT_SLOTS, len(parked)) * max(parked, default=0)
    nvme = sizes.get(Tier.NVME, 0)
    weights = sum(n for u, (t, n) in wanted.items() if t is Tier.NVME and u.startswith("hi."))
    read = nvme + weights * (2 if plan.deferred else 1)
    stored = Sizes(*(np.array(n) for n in (0, nvme, read)))
    seconds = Bound(request.spec, plan, request.profile).seconds(
        point_of(request.spec, plan), stored
    )
    return gpu, host, nvme, seconds


def _aligned(nbytes: int) -> int:
    return -(-nbytes // 4096) * 4096


@pytest.mark.parametrize("compute", Compute)
@pytest.mark.parametrize(
    ("tied", "deferred", "rows", "micro_rows"), [(True, True, 2, 1), (False, False, 1, None)]
)
def test_law_small_instances_equal_brute_force(
    compute: Compute, tied: bool, deferred: bool, rows: int, micro_rows: int | None
) -> None:
    spec = small_spec(
        layers=2,
        hidden=96,
        intermediate=130,
        heads=2,
        kv_heads=1,
        head_dim=32,
        vocab=900,
        tied=tied,
    )
    request = request_for(
        spec=spec,
        rows=rows,
        seq_len=65,
        micro_rows=micro_rows,
        window=2,
        compute=compute,
        deferred=deferred,
    )
    every, tried = Lattice(request), everything(request)
    feasible = 0
    for budgets in _telling_budgets(tried):
        fitting = [t for t in tried if t.fits(budgets)]
        solution = every.solve(budgets)
        assert (solution is not None) == bool(fitting), "refused if and only if nothing fits"
        if solution is not None:
            feasible += 1
            assert solution.rank == min(t.rank for t in fitting)
            chosen = replace(solution.plan, boundary_slots=None)
            assert chosen in [t.plan for t in fitting if t.rank == solution.rank]
        if budgets.gpu is not None:
            gpu = [t.gpu for t in tried if t.fits(replace(budgets, gpu=UNBOUNDED))]
            assert every.least_gpu(budgets) == min(gpu, default=None)
        free = replace(budgets, host=UNBOUNDED)
        host = [t.host + (t.gpu if budgets.gpu is None else 0) for t in tried if t.fits(free)]
        assert every.least_host(budgets) == min(host, default=None)
        free = replace(budgets, nvme=UNBOUNDED, nvme_writes=None)
        nvme = [t.nvme for t in tried if t.fits(free)]
        assert every.least_nvme(budgets) == min(nvme, default=None)
    assert 5 < feasible < 40, "budgets must be neither all ample nor all too small"


def point_of(spec: ModelSpec, plan: MemoryPlan) -> Counts:
    """The point of a plan on its base; its resident units must be first ones."""
    resident = sum(unit.name in plan.resident for unit in (spec.embed, *spec.layers))
    steps = plan.nvme_moments + plan.nvme_lo + plan.nvme_boundaries + plan.nvme_hi
    numbers = (resident, plan.kept, plan.spilled, plan.offloaded, steps)
    return Counts(*(np.array(number, np.int64) for number in numbers))


def _telling_budgets(tried: list[Tried]) -> Iterator[Budgets]:
    """Budgets at, and a byte below, what some plans need."""
    by_gpu, by_host = sorted(tried, key=lambda t: t.gpu), sorted(tried, key=lambda t: t.host)
    n = len(tried) - 1
    for i, (g, h) in enumerate(product((0, n // 50, n // 4, n), (0, n // 50, n // 4, n))):
        gpu, host = by_gpu[g].gpu - i % 2, by_host[h].host - i // 2 % 2
        nvme = sorted({t.nvme for t in tried})
        yield Budgets(gpu, host, max(nvme[i % len(nvme)] - i % 3, 0))
        yield Budgets(None, gpu + host, nvme[-1], nvme[(i // 2) % len(nvme)])


def ways_out(refusal: str, budgets: Budgets) -> Iterator[tuple[Budgets, list[str]]]:
    """Budgets that a refusal promises to work, and which of them it changes."""
    told = refusal.partition("the least that works is ")[2].partition(". A smaller")[0]
    assert told
    flags = {
        "gpu": "gpu-memory",
        "host": "cpu-memory",
        "nvme": "nvme-memory",
        "nvme_writes": "nvme-write-limit",
    }
    for way in told.split(" or "):
        named = {k: re.search(rf"--{flag} (\d+)MiB", way) for k, flag in flags.items()}
        changed = {k: int(found[1]) * MIB for k, found in named.items() if found}
        assert changed
        yield replace(budgets, **changed), list(changed)


@settings(max_examples=40)
@given(budgeted())
def test_law_named_budgets_work_and_a_mib_less_does_not(request: PlanRequest) -> None:
    told = planned(request)
    if isinstance(told, MemoryPlan):
        return
    for budgets, changed in ways_out(told, request.budgets):
        assert isinstance(planned(replace(request, budgets=budgets)), MemoryPlan)
        for name in changed:
            less = replace(budgets, **{name: getattr(budgets, name) - MIB})
            assert isinstance(planned(replace(request, budgets=less)), str), "not the least"


_HASH = """
from tests.memory.test_laws import plan_hash
print(plan_hash())
"""


def plan_hash() -> str:
    """A digest of a plan in which all that is chosen is chosen."""
    request = request_for(budgets=Budgets(13 * MIB, 13 * MIB, UNBOUNDED))
    plan = make_plan(request)
    fields = {name: getattr(plan, name) for name in plan.__dataclass_fields__}
    fields["resident"] = sorted(plan.resident)
    return hashlib.sha256(repr(fields).encode()).hexdigest()


def test_law_the_same_inputs_give_the_same_plan() -> None:
    def elsewhere(seed: int) -> str:
        """In another process, in which sets have another order."""
        environment = {**os.environ, "PYTHONHASHSEED": str(seed)}
        command = [sys.executable, "-c", _HASH]
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return ran.stdout.strip()

    assert elsewhere(1) == elsewhere(2)
