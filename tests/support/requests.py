"""Plan requests for small models, without torch: fixed ones and drawn ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from slideformer.graph.adapters import with_adapters
from slideformer.graph.graph import TaskGraph
from slideformer.graph.model import Lora, UnitSpec
from slideformer.graph.plan import Budgets, Compute, Optimizer
from slideformer.graph.profile import MachineProfile
from slideformer.memory.request import PlanRequest, Prediction
from slideformer.runtime.policies import make_policy
from slideformer.runtime.simulated import simulate
from tests.support.specs import small_spec

MIB = 1 << 20

PROFILE = MachineProfile(gpu_overhead=3 * MIB, host_overhead=5 * MIB)

UNBOUNDED = 1 << 62

AMPLE = Budgets(UNBOUNDED, UNBOUNDED)


def predict(graph: TaskGraph, machine: MachineProfile, steps: int) -> Prediction:
    """Simulated steps."""
    timeline = simulate(graph, make_policy("earliest-deadline"), machine, steps)
    stops = {span.task: span.stopped for span in timeline.instance(0).spans}
    return Prediction(timeline.step_seconds, stops)


def workspace(rows: int, vocab_rows: int, tile: int) -> int:
    """Temporaries that grow with the micro-batch and with the tile of logits."""
    return 100_000 * rows + 2 * vocab_rows * tile


def request_for(**changes: Any) -> PlanRequest:
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
    return replace(request, **changes)


@st.composite
def requests(draw: st.DrawFn) -> PlanRequest:
    """Models of up to some MiB, of all forms, on ample budgets."""
    spec = small_spec(
        layers=draw(st.integers(1, 5)),
        hidden=draw(st.integers(1, 200) | st.just(128)),  # whose rows are whole blocks
        intermediate=draw(st.integers(1, 400)),
        heads=4,
        kv_heads=draw(st.sampled_from([1, 2, 4])),
        head_dim=draw(st.sampled_from([2, 32])),
        vocab=draw(st.integers(1, 4000)),
        tied=draw(st.booleans()),
        windows=draw(st.sampled_from([(), (3,), (3, 50)])),
    )
    change = draw(st.sampled_from(["none", "frozen", "adapters"]))
    if change == "adapters":
        spec = with_adapters(spec, Lora(draw(st.integers(1, 8)), 16.0))
    if change == "frozen":
        frozen = draw(st.frozensets(st.sampled_from([unit.name for unit in spec.units])))
        spec = replace(spec, units=tuple(_frozen(u) if u.name in frozen else u for u in spec.units))
    return request_for(
        spec=spec,
        rows=draw(st.sampled_from([1, 2, 3, 4, 6])),
        seq_len=draw(st.sampled_from([1, 64, 257])),
        compute=draw(st.sampled_from(Compute)),
        optimizer=draw(st.sampled_from(Optimizer)),
        packed=draw(st.booleans()),
        deferred=draw(st.booleans()),
    )


def _frozen(unit: UnitSpec) -> UnitSpec:
    return replace(unit, params=tuple(replace(p, frozen=True) for p in unit.params))
