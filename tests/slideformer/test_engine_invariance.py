"""Within the same numerics, trained weights are the same bits whatever lies or runs where and when.

The numerics are micro-batch, vocabulary chunks, head tile, packing, compute dtype and a clipping
that bites. Hypothesis draws all the rest: policy, window, update chunks, offloaded boundaries, kept
and spilled activations, resident units, gradient slots and threads, and deferred updates where
nothing is clipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slideformer.runtime.policies import make_policy, policy_names
from tests.support.engines import (
    config_for,
    different,
    engine_with,
    make_batch,
    packed_batch,
    state_of,
    write_model,
)
from tests.support.policies import AtRandom

LAYERS = 3
POLICIES = [*policy_names(), "at-random"]
BATCHES = [make_batch(0), make_batch(1, lengths=[16, 7, 0, 12]), make_batch(2)]
PACKED = [
    BATCHES[0],
    packed_batch(1, [[9, 7], [5, 2, 1, 8], [3], [16]]),
    packed_batch(2, [[], [16], [1, 1, 14], [4, 4, 4]]),
]
OTHERS: dict[str, dict[str, Any]] = {
    "gemma2": {},
    "gemma3_text": {},
    "qwen3_moe-normalised": {"output_router_logits": True},
}
"""Families whose layers or embeddings do what the others' do not."""
NUMERICS: dict[str, dict[str, Any]] = {
    "two micro-batches": {},
    "one micro-batch": {"micro_rows": 4},
    "tiles": {"head_tile": 5},
    "vocabulary chunks": {"vocab_chunks": 3},
    "packed": {"packed": True},
    "clipped": {"max_grad_norm": 0.5},
}


@dataclass(frozen=True)
class Outcome:
    """Everything that must not depend on placement and order."""

    state: dict[str, Tensor]
    losses: list[float]
    evaluations: list[float]
    norms: list[float]


def train(
    folder: Path, numerics: dict[str, Any], *, policy: str = "fifo", threads: int = 1, **plan: Any
) -> Outcome:
    """Three steps and two evaluations, all submitted before the first is read."""
    plan = {**plan, **numerics}
    config = config_for(
        folder,
        compute="bf16",
        threads=threads,
        weight_decay=0.1,
        max_grad_norm=plan.pop("max_grad_norm", None),
    )
    if config.deferred:  # then each gradient has a place of its own
        plan["gradient_slots"] = 0
    chosen = AtRandom(plan.get("seed", 0)) if policy == "at-random" else make_policy(policy)
    batches = PACKED if numerics.get("packed") else BATCHES
    with engine_with(config, policy=chosen, **plan) as engine:
        steps = [engine.step(batches[0])]
        evaluations = [engine.evaluate(batches[1])]
        steps += [engine.step(batch) for batch in batches[1:]]
        evaluations += [engine.evaluate(batches[1])]
        return Outcome(
            state_of(engine),
            [step.loss() for step in steps],
            [evaluation.loss() for evaluation in evaluations],
            [step.gradient_norm() for step in steps],
        )


@dataclass(frozen=True)
class Model:
    """A checkpoint and what it becomes by the plainest plan, for each numerics."""

    folder: Path
    units: tuple[str, ...]
    plain: dict[str, Outcome]


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """With biases, so with padding between operands, and with windows."""
    tied = bool(request.param)
    folder = write_model(
        tmp_path_factory.mktemp("model"),
        "qwen2",
        tied=tied,
        use_sliding_window=True,
        sliding_window=6,
        max_window_layers=1,
        pad_token_id=0,
    )
    units = ("embed", *(f"L{i:02d}" for i in range(LAYERS)), "norm", *(() if tied else ("head",)))
    return Model(folder, units, {name: train(folder, key) for name, key in NUMERICS.items()})


@st.composite
def placements(draw: st.DrawFn) -> dict[str, Any]:
    """All that decides where and when, and nothing that decides rounding."""
    kept = draw(st.integers(0, LAYERS))
    return {
        "policy": draw(st.sampled_from(POLICIES)),
        "threads": draw(st.integers(1, 4)),
        "window": draw(st.integers(2, 4)),
        "chunk_numel": draw(st.sampled_from([500, 3000, 20_000, 1 << 25])),
        "offloaded": draw(st.integers(0, LAYERS)),
        "kept": kept,
        "spilled": draw(st.integers(0, LAYERS - kept)),
        "staging_slots": draw(st.integers(1, 4)),
        "gradient_slots": draw(st.integers(0, 3)),
        "max_grad_norm": draw(st.sampled_from([None, 1e9])),
        "seed": draw(st.integers(0, 99)),
    }


residents = st.frozensets(st.integers(0, 5))


def check(model: Model, name: str, placement: dict[str, Any]) -> None:
    """Train by a placement and compare with the plainest one."""
    plain = model.plain[name]
    outcome = train(model.folder, NUMERICS[name], **placement)
    assert different(outcome.state, plain.state) == []
    assert outcome.losses == plain.losses
    assert outcome.evaluations == plain.evaluations
    assert outcome.norms == pytest.approx(plain.norms, rel=1e-13), "it is summed chunk by chunk"


@settings(max_examples=18)
@given(name=st.sampled_from(sorted(NUMERICS)), placement=placements(), resident=residents)
def test_weights_do_not_depend_on_placement_order_or_threads(
    model: Model, name: str, placement: dict[str, Any], resident: frozenset[int]
) -> None:
    units = frozenset(model.units[i] for i in resident if i < len(model.units))
    check(model, name, {**placement, "resident": units})


@pytest.mark.parametrize("variant", OTHERS)
def test_weights_of_other_families_do_not_depend_on_placement(variant: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", variant, tied=True, **OTHERS[variant])
    plain = {"two micro-batches": train(folder, {})}
    placement = {
        "resident": frozenset(["embed", "L01"]),
        "window": 2,
        "chunk_numel": 3000,
        "offloaded": 2,
        "kept": 1,
        "spilled": 1,
    }
    check(Model(folder, (), plain), "two micro-batches", placement)


@pytest.mark.parametrize("policy", POLICIES)
def test_weights_do_not_depend_on_the_policy(model: Model, policy: str) -> None:
    check(model, "two micro-batches", {"policy": policy, "chunk_numel": 3000, "gradient_slots": 2})


@pytest.mark.parametrize("name", NUMERICS)
def test_training_changes_every_unit_and_numerics_change_bits(model: Model, name: str) -> None:
    """So that equal bits mean something."""
    plain = model.plain[name]
    with engine_with(config_for(model.folder, compute="bf16")) as engine:
        before = state_of(engine)
    changed = different(plain.state, before)
    assert {key for key in changed if key.endswith(".hi")} == {f"{u}.hi" for u in model.units}
    others = [outcome for other, outcome in model.plain.items() if other != name]
    assert any(different(plain.state, other.state) for other in others)
    assert plain.evaluations[0] != plain.evaluations[1]


@pytest.fixture(autouse=True)
def operator_threads() -> Iterator[None]:
    """The number of PyTorch's own threads is part of the numerics; keep it."""
    before = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == before
