"""Deferred updates: clipping and skipping as a plain PyTorch loop does them, in FP32."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from slideformer.checkpointing import Checkpoint
from slideformer.graph.errors import NonFiniteError
from slideformer.models.clip_ops import SKIP_LIMIT, clip_factor
from tests.support.engines import (
    check_equal,
    check_moved,
    config_for,
    different,
    engine_with,
    make_batch,
    state_of,
    stored_weights,
    too_far,
    train,
    train_reference,
    weights_of,
    write_model,
)
from tests.support.spoiling import spoil

LR = 5e-4
STEPS = 20
BATCHES = [make_batch(seed) for seed in range(STEPS)]
MAX_NORM = 0.3
"""Below the norm of every step here."""

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, tied": ("llama-biases", {"tied": True}),
    "qwen2": ("qwen2", {}),
    "qwen3, tied": ("qwen3-biases", {"tied": True}),
    "mistral, windowed": ("mistral", {}),
}


def rates(step: int) -> float:
    """Learning rates that rise and fall."""
    return LR * min((step + 1) / 5, 1.0, (STEPS - step) / 10)


@pytest.mark.parametrize("name", MODELS)
def test_clipping_that_bites_equals_plain_pytorch(name: str, tmp_path: Path) -> None:
    variant, settings = MODELS[name]
    folder = write_model(tmp_path / "model", variant, **settings)
    reference = train_reference(folder, BATCHES, lr=rates, weight_decay=0.1, max_norm=MAX_NORM)
    check_moved(reference, stored_weights(folder))
    assert min(reference.norms) > 1.1 * MAX_NORM, "it bites at every step"
    config = config_for(folder, weight_decay=0.1, max_grad_norm=MAX_NORM)
    check_equal(train(config, BATCHES, lr=rates), reference)


@pytest.mark.parametrize("tied", [False, True])
def test_clipping_equals_plain_pytorch_however_the_work_is_cut(tied: bool, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "llama-biases", tied=tied)
    batches = BATCHES[:4]
    reference = train_reference(folder, batches, lr=LR, max_norm=MAX_NORM)
    plan = {"vocab_chunks": 3, "head_tile": 7, "chunk_numel": 2000}
    clipping = config_for(folder, lr=LR, max_grad_norm=MAX_NORM)
    check_equal(train(clipping, batches, **plan), reference)
    unclipped = train(config_for(folder, lr=LR), batches, **plan).weights
    assert len(too_far(unclipped, reference.weights)) > len(reference.weights) // 2, "it matters"


def test_a_norm_below_the_limit_changes_no_bit(tmp_path: Path) -> None:
    """Clipping at twice the norm gives what overlapped updates give; at half of it, it does not."""
    folder = write_model(tmp_path / "model", tied=True)
    states, norms = {}, []
    for factor in (None, 2.0, 0.5):
        limit = None if factor is None else factor * max(norms)
        config = config_for(folder, compute="bf16", max_grad_norm=limit)
        with engine_with(config) as engine:
            norms = [engine.step(batch).gradient_norm() for batch in BATCHES[:3]]
            states[factor] = state_of(engine)
    assert different(states[2.0], states[None]) == []
    assert different(states[0.5], states[None])


@pytest.mark.parametrize(
    ("tied", "max_norm", "value"),
    [(False, None, math.nan), (True, MAX_NORM, math.inf), (True, None, -math.inf)],
)
def test_a_step_that_is_not_finite_is_skipped(
    tied: bool,
    max_norm: float | None,
    value: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As if the step had been left out: its moments and its number are not counted either."""
    folder = write_model(tmp_path / "model", tied=tied)
    skipped, batches = {0, 3, 4}, BATCHES[:8]
    kwargs: dict[str, Any] = {"lr": rates, "weight_decay": 0.1, "max_norm": max_norm}
    reference = train_reference(folder, batches, skipped=skipped, **kwargs)
    spoil(monkeypatch, skipped, value)
    config = config_for(folder, weight_decay=0.1, max_grad_norm=max_norm, skip_nonfinite=True)
    with engine_with(config, micro_rows=4) as engine:
        handles = [engine.step(batch, lr=rates(i)) for i, batch in enumerate(batches)]
        assert {i for i, handle in enumerate(handles) if handle.skipped()} == skipped
        assert [h.loss() for h in handles] == pytest.approx(reference.losses, rel=1e-5)
        assert too_far(weights_of(engine), reference.weights) == []


@pytest.mark.parametrize("tied", [False, True])
def test_a_skipped_step_leaves_no_bit_behind_wherever_things_lie(
    tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and moments are those of a run by overlapped updates without that step."""
    folder = write_model(tmp_path / "model", tied=tied)
    settings: dict[str, Any] = {"compute": "bf16", "weight_decay": 0.1}
    with engine_with(config_for(folder, **settings), micro_rows=4) as engine:
        for batch in (BATCHES[0], BATCHES[2]):
            engine.step(batch)
        expected = state_of(engine)
    spoil(monkeypatch, {1})
    placements: list[dict[str, Any]] = [
        {"window": 2, "offloaded": 3},
        {"resident": frozenset({"embed", "L00", "norm"}), "kept": 1},
        {"nvme_moments": 3, "nvme_lo": 2, "nvme_hi": 1},
    ]
    for placement in placements:
        nvme = (tmp_path,) if "nvme_moments" in placement else ()
        config = config_for(folder, skip_nonfinite=True, nvme=nvme, **settings)
        with engine_with(config, micro_rows=4, **placement) as engine:
            handles = [engine.step(batch) for batch in BATCHES[:3]]
            assert [handle.skipped() for handle in handles] == [False, True, False]
            assert different(state_of(engine), expected) == [], placement


def test_a_resumed_run_does_not_count_skipped_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step behind those of the checkpoint is skipped too, before its count is taken."""
    folder = write_model(tmp_path / "model")
    config = config_for(folder, compute="bf16", skip_nonfinite=True)
    spoil(monkeypatch, {1, 2, 4})
    with engine_with(config, micro_rows=4) as engine:
        for batch in BATCHES[:4]:
            engine.step(batch)
        pending = engine.checkpoint(tmp_path / "checkpoint")
        assert engine.step(BATCHES[4]).skipped()
        pending.finish()
        engine.step(BATCHES[5]).wait()
        expected = state_of(engine)
    spoil(monkeypatch, {0})
    checkpoint = Checkpoint(tmp_path / "checkpoint")
    assert (checkpoint.info.step, checkpoint.info.skipped) == (4, 2)
    with engine_with(config, checkpoint=checkpoint, micro_rows=4) as engine:
        for batch in BATCHES[4:6]:
            engine.step(batch)
        assert different(state_of(engine), expected) == []


def test_too_many_skipped_steps_in_a_row_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_model(tmp_path / "model")
    spoil(monkeypatch, {0, *range(2, SKIP_LIMIT + 2)})
    with engine_with(config_for(folder, skip_nonfinite=True), micro_rows=4) as engine:
        handles = [engine.step(BATCHES[0]) for _ in range(SKIP_LIMIT + 1)]
        assert [handle.skipped() for handle in handles] == [i != 1 for i in range(SKIP_LIMIT + 1)]
        with pytest.raises(NonFiniteError, match=rf"L01\.c0: .* {SKIP_LIMIT}th step in a row"):
            engine.step(BATCHES[0]).gradient_norm()


def test_without_skipping_a_gradient_that_is_not_finite_fails_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_model(tmp_path / "model")
    spoil(monkeypatch, {1})
    with engine_with(config_for(folder, max_grad_norm=1.0), micro_rows=4) as engine:
        before = engine.step(BATCHES[0])
        failed = engine.step(BATCHES[1])
        assert not before.skipped()
        with pytest.raises(NonFiniteError, match=r"clip\.norm#1: L01\.c0: the gradient is not"):
            failed.gradient_norm()


@pytest.mark.parametrize("norm", [0.0, 0.3, 0.299_999, 1.0, 12345.6])
def test_the_factor_is_that_of_pytorch(norm: float) -> None:
    gradient = torch.full((1,), norm)
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.ones(1)
    torch.nn.utils.clip_grads_with_norm_([parameter], MAX_NORM, gradient[0])
    assert clip_factor(norm, MAX_NORM) == float(parameter.grad)
    assert clip_factor(norm, None) == 1.0
