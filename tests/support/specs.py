"""Model specs and memory plans, small and awkward, without torch: fixed ones and drawn ones."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from slideformer.graph.model import ModelSpec, ParamGroup, UnitKind, UnitSpec, layout_unit
from slideformer.graph.plan import Compute, MemoryPlan, Optimizer


def small_spec(
    *,
    layers: int = 3,
    hidden: int = 24,
    intermediate: int = 40,
    heads: int = 2,
    kv_heads: int = 1,
    head_dim: int = 12,
    vocab: int = 37,
    tied: bool = False,
    windows: tuple[int, ...] = (),
) -> ModelSpec:
    """A decoder whose operands do not end at the alignment, so that units have padding."""
    matrix = (vocab, hidden)
    units = [_single("embed", UnitKind.EMBED, matrix)]
    for number in range(layers):
        key = f"layers.{number}."
        groups = [
            ParamGroup(
                "qkv.weight",
                (
                    (f"{key}q", (heads * head_dim, hidden)),
                    (f"{key}k", (kv_heads * head_dim, hidden)),
                    (f"{key}v", (kv_heads * head_dim, hidden)),
                ),
                True,
            ),
            ParamGroup("o.weight", ((f"{key}o", (hidden, heads * head_dim)),), True),
            ParamGroup(
                "gate_up.weight",
                ((f"{key}gate", (intermediate, hidden)), (f"{key}up", (intermediate, hidden))),
                True,
            ),
            ParamGroup("down.weight", ((f"{key}down", (hidden, intermediate)),), True),
            ParamGroup("input_norm.weight", ((f"{key}norm", (hidden,)),), False),
        ]
        units.append(layout_unit(f"L{number:02d}", UnitKind.LAYER, groups))
    units.append(_single("norm", UnitKind.NORM, (hidden,)))
    if not tied:
        units.append(_single("head", UnitKind.HEAD, matrix))
    return ModelSpec(
        family="llama",
        hidden=hidden,
        intermediate=intermediate,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        rotary_dim=head_dim,
        vocab=vocab,
        max_positions=128,
        tied=tied,
        units=tuple(units),
        windows=windows,
    )


def freeze(spec: ModelSpec, names: Collection[str]) -> ModelSpec:
    """``spec`` with the units, or parameters, of these names frozen."""
    units = tuple(
        replace(
            unit,
            params=tuple(
                replace(p, frozen=unit.name in names or p.key in names) for p in unit.params
            ),
        )
        for unit in spec.units
    )
    return replace(spec, units=units)


def _single(name: str, kind: UnitKind, shape: tuple[int, ...]) -> UnitSpec:
    return layout_unit(name, kind, [ParamGroup("weight", ((f"{name}.weight", shape),), True)])


def small_plan(**changes: Any) -> MemoryPlan:
    """A draft plan of two micro-batches of two rows of eight tokens; ``changes`` replace fields."""
    fields: dict[str, Any] = {
        "compute": Compute.BF16,
        "rows": 4,
        "seq_len": 8,
        "micro_rows": 2,
        "vocab_chunks": 1,
        "head_tile": 16,
        "window": 2,
        "chunk_numel": 512,
        "offloaded": 0,
        "staging_slots": 2,
    }
    return MemoryPlan(**{**fields, **changes})


def draft(plan: MemoryPlan) -> MemoryPlan:
    """The same plan with unbounded gradient parking and boundaries."""
    return replace(plan, boundary_slots=None, gradient_slots=0, gradient_slot=())


@st.composite
def specs(draw: st.DrawFn) -> ModelSpec:
    """Small decoders of all forms, some with frozen units; something is trained."""
    spec = small_spec(
        layers=draw(st.integers(1, 4)),
        hidden=draw(st.integers(1, 24) | st.just(128)),
        intermediate=draw(st.integers(1, 30)),
        kv_heads=draw(st.integers(1, 2)),
        head_dim=draw(st.integers(1, 8)),
        vocab=draw(st.integers(1, 60)),
        tied=draw(st.booleans()),
        windows=draw(st.sampled_from([(), (3,), (3, 5)])),
    )
    names = [unit.name for unit in spec.units]
    names.remove(draw(st.sampled_from(names)))
    return freeze(spec, draw(st.just(()) | st.just(names) | st.sets(st.sampled_from(names))))


@st.composite
def draft_plans(draw: st.DrawFn, spec: ModelSpec) -> MemoryPlan:
    """Plans without gradient slots for a spec."""
    micro_rows = draw(st.integers(1, 3))
    seq_len = draw(st.integers(1, 9))
    compute = draw(st.sampled_from(Compute))
    kept = draw(st.integers(0, len(spec.layers)))
    units = st.sampled_from([unit.name for unit in spec.units])
    return MemoryPlan(
        compute=compute,
        rows=micro_rows * draw(st.integers(1, 3)),
        seq_len=seq_len,
        micro_rows=micro_rows,
        vocab_chunks=draw(st.integers(1, 4)),
        head_tile=draw(st.integers(1, micro_rows * seq_len)),
        window=draw(st.integers(2, 4)),
        chunk_numel=draw(st.integers(100, 2000)),
        offloaded=draw(st.integers(0, len(spec.layers))),
        staging_slots=draw(st.integers(1, 3)),
        resident=draw(st.frozensets(units)) if compute is Compute.BF16 else frozenset(),
        kept=kept,
        spilled=draw(st.integers(0, len(spec.layers) - kept)),
        optimizer=draw(st.sampled_from(Optimizer)),
        deferred=draw(st.booleans()),
    )
