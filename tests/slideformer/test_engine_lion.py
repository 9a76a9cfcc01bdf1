"""Lion: trains as a plain PyTorch loop, with the same bits wherever things lie, in less memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from slideformer.checkpointing import Checkpoint
from slideformer.engine import Engine
from slideformer.graph.errors import CheckpointError
from slideformer.memory.layout import lay_out, places
from tests.support.engines import (
    MICRO_ROWS,
    ROWS,
    Weights,
    backward,
    check_same_bits,
    config_for,
    different,
    engine_with,
    make_batch,
    state_of,
    train,
    write_model,
)

LR, DECAY = 1e-4, 0.5
BATCHES = [make_batch(seed) for seed in range(5)]


def train_reference(folder: Path) -> tuple[list[float], Weights]:
    """Losses and weights of a plain loop in FP32, by algorithm 2 of the paper."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    named = dict(model.named_parameters())
    moments = {name: torch.zeros_like(p) for name, p in named.items()}
    losses = []
    for batch in BATCHES:
        model.zero_grad()
        losses.append(sum(backward(model, batch, s) for s in range(0, ROWS, MICRO_ROWS)))
        with torch.no_grad():
            for name, parameter in named.items():
                assert parameter.grad is not None
                m, decay = moments[name], DECAY if parameter.dim() > 1 else 0.0
                direction = (0.9 * m + 0.1 * parameter.grad).sign()
                parameter.sub_(LR * (direction + decay * parameter))
                m.mul_(0.99).add_(parameter.grad, alpha=0.01)
    return losses, {name: p.detach() for name, p in named.items()}


def share_off(ours: Weights, reference: Weights) -> float:
    """Share of all elements that are further from the reference than rounding takes them."""
    off = sum(
        int(((ours[n] - w).abs() > 1e-6 + 1e-5 * w.abs()).sum()) for n, w in reference.items()
    )
    return off / sum(w.numel() for w in reference.values())


@pytest.mark.parametrize("tied", [False, True])
def test_training_equals_plain_pytorch(tied: bool, tmp_path: Path) -> None:
    """A direction may flip where it is as good as zero: there rounding decides it."""
    folder = write_model(tmp_path / "model", tied=tied)
    losses, reference = train_reference(folder)
    config = config_for(folder, lr=LR, weight_decay=DECAY, optimizer="lion")
    found = train(config, BATCHES, chunk_numel=3000)
    assert found.losses == pytest.approx(losses, rel=1e-5)
    assert share_off(found.weights, reference) < 1e-4
    other = train(config.model_copy(update={"beta2": 0.9}), BATCHES)
    assert share_off(other.weights, reference) > 1e-2, "so the comparison can fail"


@pytest.mark.parametrize("tied", [False, True])
def test_where_things_lie_changes_no_bit(tied: bool, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "qwen2", tied=tied)
    config = config_for(folder, lr=LR, compute="bf16", optimizer="lion", weight_decay=0.1)
    plans: list[dict[str, Any]] = [
        {},
        {"chunk_numel": 700, "deferred": True},
        {"resident": frozenset({"embed", "L01", "norm"}), "kept": 1},
        {"resident": frozenset({"embed", "L00"}), "deferred": True},
        {"nvme_moments": 3, "nvme_lo": 2, "nvme_hi": 1, "chunk_numel": 3000},
    ]
    outcomes = [
        train(config.model_copy(update={"threads": i % 3 + 1, "nvme": (tmp_path,)}), BATCHES, **p)
        for i, p in enumerate(plans)
    ]
    check_same_bits(*outcomes)


def test_its_state_takes_four_bytes_less(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    found = []
    for optimizer in ("adamw", "lion"):
        with Engine(config_for(folder, optimizer=optimizer, cpu_memory="8GiB")) as engine:
            assert engine.plan.optimizer == optimizer
            resident = len(engine.plan.resident)
            sizes = lay_out(places(engine._graphs)).sizes
            found.append((resident, sum(sizes.values())))
            numel = sum(unit.numel for unit in engine.spec.units)
    (_, adamw), (_, lion) = found
    assert found[0][0] == found[1][0]
    assert adamw - lion == pytest.approx(4 * numel, rel=0.02)


def test_a_checkpoint_has_one_moment_and_is_resumed_with_the_same_bits(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    config = config_for(folder, lr=LR, compute="bf16", optimizer="lion")
    with engine_with(config, resident=frozenset({"L01"})) as engine:
        engine.step(BATCHES[0])
        path = engine.checkpoint(tmp_path / "step-1").finish()
        engine.step(BATCHES[1])
        plain = state_of(engine)
    checkpoint = Checkpoint(path)
    for unit in engine.spec.units:
        assert (path / "units" / unit.name).stat().st_size == 8 * unit.numel
    with engine_with(config, checkpoint=checkpoint, resident=frozenset({"embed"})) as engine:
        engine.step(BATCHES[1])
        assert different(state_of(engine), plain) == []
    other = config.model_copy(update={"optimizer": "adamw"})
    with (
        pytest.raises(CheckpointError, match=r"of the optimizer lion, the settings ask for adamw"),
        engine_with(other, checkpoint=checkpoint),
    ):
        pass
