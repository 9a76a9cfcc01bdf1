"""The outlook of a plan: larger budgets never cost time, and gains are those of solving again."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from slideformer.graph.plan import Budgets
from slideformer.memory.request import PlanRequest
from slideformer.memory.solver import GRID, Lattice
from slideformer.outlook import MORE, outlook, solve_each
from tests.support.requests import AMPLE, UNBOUNDED, request_for, requests
from tests.support.specs import small_spec


def fastest(lattice: Lattice, budgets: Budgets) -> float:
    """The least bound of all plans within ``budgets``, looked for on every base."""
    fitting = (lattice._fitting(base, budgets).seconds for base in lattice._bases)
    return min(float(seconds.min()) for seconds in fitting if len(seconds))


def test_gains_are_those_of_a_larger_budget() -> None:
    spec = small_spec(
        layers=8, hidden=4096, intermediate=8192, heads=32, kv_heads=8, head_dim=128, vocab=9999
    )
    request = request_for(spec=spec, seq_len=2048, rows=8)
    lattice = Lattice(request)
    gpu = lattice.least_gpu(AMPLE)
    assert gpu is not None
    budgets = Budgets(gpu, UNBOUNDED)
    larger = Budgets(gpu + MORE, UNBOUNDED)
    before, after = solve_each(request, [budgets, larger])
    assert before is not None
    assert after is not None
    least = fastest(lattice, budgets)
    found = outlook(lattice, before.plan, budgets)
    assert found.bound == before.seconds >= least > before.seconds / (1 + GRID)
    assert found.gains == {
        "GPU memory": 1 - fastest(lattice, larger) / least,
        "host memory": 0.0,
    }
    assert found.gains["GPU memory"] > 0.005
    assert found.work[found.binding] == max(found.work.values()) <= found.bound


@settings(max_examples=10)
@given(requests(), st.sampled_from([0, UNBOUNDED - MORE]))
def test_no_gain_is_negative(request: PlanRequest, nvme: int) -> None:
    lattice = Lattice(request)
    gpu, host = lattice.least_gpu(AMPLE), lattice.least_host(AMPLE)
    assert gpu is not None
    assert host is not None
    budgets = Budgets(2 * gpu, 2 * host, nvme)
    best = lattice.solve(budgets)
    assert best is not None
    found = outlook(lattice, best.plan, budgets)
    assert all(0 <= gain < 1 for gain in found.gains.values())
    assert ("NVMe" in found.gains) == bool(nvme)


@settings(max_examples=20)
@given(requests(), st.sampled_from([0, UNBOUNDED]))
def test_the_outlook_is_that_of_the_plan_chosen(request: PlanRequest, nvme: int) -> None:
    """Which need not be the one of the least bound."""
    lattice = Lattice(request)
    gpu, host = lattice.least_gpu(AMPLE), lattice.least_host(replace(AMPLE, nvme=nvme))
    assert gpu is not None
    assert host is not None
    budgets = Budgets(2 * gpu, host + host // 4, nvme)
    best = lattice.solve(budgets)
    assert best is not None
    for each in lattice.contenders(budgets, best, 8):
        found = outlook(lattice, each.plan, budgets)
        assert (found.bound, found.work) == (each.seconds, each.work)
