"""AdamW with moments of 8 bits: near AdamW, the same bits wherever things lie, in less memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slideformer.checkpointing import Checkpoint
from slideformer.engine import Engine
from slideformer.graph.errors import CheckpointError
from slideformer.graph.model import UnitSpec
from slideformer.graph.state import BLOCK
from slideformer.kernels import adamw8
from slideformer.kernels.quantise import FIRST, SECOND, decode
from slideformer.kernels.split import split_master
from slideformer.memory.layout import lay_out, places
from tests.models.tiny import joined
from tests.support.engines import (
    MICRO_ROWS,
    ROWS,
    Weights,
    backward,
    check_same_bits,
    config_for,
    different,
    engine_with,
    load_model,
    make_batch,
    state_of,
    stored_weights,
    too_far,
    train,
    train_reference,
    weights_of,
    write_model,
)

LR, DECAY = 1e-3, 0.1
BATCHES = [make_batch(seed) for seed in range(5)]
WIDE: dict[str, Any] = {"hidden_size": 128, "num_hidden_layers": 2}
"""Rows of its output matrix are whole blocks."""


def in_8_bits(unit: UnitSpec) -> bool:
    """All but the embedding, and an output matrix whose rows are no whole blocks."""
    whole = unit.params[0].shape[-1] % 128 == 0
    return unit.name != "embed" and (unit.name != "head" or whole)


def named(engine: Engine, flat: dict[str, Tensor]) -> Weights:
    """FP32 values of all units by the names of their parameters."""
    halves = {}
    for unit, values in flat.items():
        hi, lo = torch.empty(2, len(values), dtype=torch.int16)
        split_master(values, hi, lo)
        halves[unit] = (hi, lo)
    return {name: value.clone() for name, value in joined(engine.spec, halves)}


def moments_of(engine: Engine) -> tuple[Weights, Weights]:
    """Both moments in FP32 by the names of their parameters."""
    engine.synchronize()
    first, second = {}, {}
    for unit in engine.spec.units:
        state = engine._memory.whole(unit.name)
        assert (state.m.dtype == torch.uint8) == in_8_bits(unit)
        if in_8_bits(unit):
            scales = state.scales.view(-1, 2)
            first[unit.name] = decode(state.m, scales[:, 0], FIRST)
            second[unit.name] = decode(state.v, scales[:, 1], SECOND)
        else:
            first[unit.name], second[unit.name] = state.m.clone(), state.v.clone()
    return named(engine, first), named(engine, second)


def test_units_share_scales_by_the_blocks_of_the_kernels() -> None:
    assert BLOCK == adamw8.BLOCK


def test_each_step_is_that_of_plain_pytorch(tmp_path: Path) -> None:
    """From the moments that its codes stand for; rounding to codes is between the steps."""
    folder = write_model(tmp_path / "model", **WIDE)
    config = config_for(folder, lr=LR, weight_decay=DECAY, optimizer="adamw8bit")
    model = load_model(folder)
    with engine_with(config, chunk_numel=3000) as engine:
        for step, batch in enumerate(BATCHES[:3], start=1):
            before, (first, second) = weights_of(engine), moments_of(engine)
            engine.step(batch)
            expected: Weights = {}
            moments: tuple[Weights, Weights] = ({}, {})
            model.load_state_dict(before)
            model.zero_grad()
            for start in range(0, ROWS, MICRO_ROWS):
                backward(model, batch, start)
            for name, parameter in model.named_parameters():
                m = 0.9 * first[name] + 0.1 * parameter.grad
                v = 0.999 * second[name] + 0.001 * parameter.grad.square()
                decay = DECAY if parameter.dim() > 1 else 0.0
                change = (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
                expected[name] = before[name] * (1 - LR * decay) - LR * change
                moments[0][name], moments[1][name] = m, v
            assert too_far(weights_of(engine), expected) == []
            for found, values in zip(moments_of(engine), moments, strict=True):
                for name, value in values.items():
                    # A step to the next code, or, of what is next to nothing in its block, to zero.
                    room = 0.126 * value.abs() + 1e-4 * value.abs().max()
                    assert ((found[name] - value).abs() <= room).all(), name


def test_training_goes_as_with_full_moments(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", **WIDE)
    batches = [BATCHES[i % len(BATCHES)] for i in range(60)]
    reference, start = train_reference(folder, batches, lr=LR), stored_weights(folder)
    assert reference.losses[-1] < 0.5 * reference.losses[0], "it learns them"
    config = config_for(folder, lr=LR, optimizer="adamw8bit")
    found = train(config, batches)
    assert found.losses == pytest.approx(reference.losses, rel=0.01)
    for name, weights in reference.weights.items():
        off, moved = found.weights[name] - weights, weights - start[name]
        assert float(off.norm()) < 0.15 * float(moved.norm()), name
    other = train(config.model_copy(update={"beta2": 0.9}), batches)
    assert other.losses != pytest.approx(reference.losses, rel=0.01), "so the comparison can fail"


@pytest.mark.parametrize("tied", [False, True])
def test_where_things_lie_changes_no_bit(tied: bool, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "qwen2", tied=tied, **WIDE)
    settings = {"lr": LR, "compute": "bf16", "optimizer": "adamw8bit", "weight_decay": DECAY}
    config = config_for(folder, **settings)
    plans: list[dict[str, Any]] = [
        {},
        {"chunk_numel": 9000, "deferred": True},
        {"resident": frozenset({"embed", "L01", "norm"}), "kept": 1},
        {"resident": frozenset({"L00", "head"} - ({"head"} if tied else set())), "deferred": True},
        {"nvme_moments": 2, "nvme_lo": 1, "nvme_hi": 1, "chunk_numel": 20000},
        {"nvme_moments": 1, "nvme_slots": 1, "chunk_numel": 15000, "deferred": True},
    ]
    outcomes = []
    for i, plan in enumerate(plans):
        changes = {"threads": i % 3 + 1, "nvme": (tmp_path,) if "nvme_moments" in plan else ()}
        outcomes.append(train(config.model_copy(update=changes), BATCHES, **plan))
    check_same_bits(*outcomes)


def test_parts_that_are_frozen_or_have_rates_of_their_own(tmp_path: Path) -> None:
    """Operands of several parameters with biases of 32 elements, so blocks have some of each."""
    folder = write_model(tmp_path / "model", "qwen2")
    groups = [
        {"pattern": "*.k_proj.bias", "frozen": True},
        {"pattern": "*.q_proj.bias", "lr_scale": 0.5},
    ]
    settings = {"lr": LR, "optimizer": "adamw8bit", "parameter_groups": groups}
    start = stored_weights(folder)
    outcomes = []
    for plan in ({}, {"chunk_numel": 500}):
        with engine_with(config_for(folder, **settings), **plan) as engine:
            for batch in BATCHES:
                engine.step(batch).loss()
            outcomes.append(state_of(engine))
            weights, (first, _) = weights_of(engine), moments_of(engine)
    assert different(*outcomes) == []
    for name, value in weights.items():
        frozen = name.endswith("k_proj.bias")
        assert torch.equal(value, start[name]) == frozen, name
        assert bool(first[name].any()) != frozen, name


def test_adapters_are_trained(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    settings = {"lr": LR, "lora": {"rank": 4, "alpha": 8}}
    batches = [BATCHES[i % len(BATCHES)] for i in range(20)]
    full, eight = (
        train(config_for(folder, optimizer=name, **settings), batches).losses
        for name in ("adamw", "adamw8bit")
    )
    assert eight == pytest.approx(full, rel=0.01)
    assert eight != full


def test_its_state_takes_six_bytes_less(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", **WIDE)
    sizes = []
    for optimizer in ("adamw", "adamw8bit"):
        with Engine(config_for(folder, optimizer=optimizer, cpu_memory="8GiB")) as engine:
            assert engine.plan.optimizer == optimizer
            sizes.append(sum(lay_out(places(engine._graphs)).sizes.values()))
            numel = sum(unit.numel for unit in engine.spec.units if in_8_bits(unit))
    saved = (6 - 8 / BLOCK) * numel
    assert sizes[0] - sizes[1] == pytest.approx(saved, rel=0.02)


def test_a_checkpoint_has_codes_and_scales_and_is_resumed_with_the_same_bits(
    tmp_path: Path,
) -> None:
    folder = write_model(tmp_path / "model", **WIDE)
    config = config_for(folder, lr=LR, compute="bf16", optimizer="adamw8bit")
    with engine_with(config, resident=frozenset({"L01"})) as engine:
        engine.step(BATCHES[0])
        path = engine.checkpoint(tmp_path / "step-1").finish()
        engine.step(BATCHES[1])
        plain = state_of(engine)
    checkpoint = Checkpoint(path)
    for unit in engine.spec.units:
        nbytes = 6 * unit.numel + 8 * -(-unit.numel // BLOCK)
        expected = nbytes if in_8_bits(unit) else 12 * unit.numel
        assert (path / "units" / unit.name).stat().st_size == expected
    stored = config.model_copy(update={"nvme": (tmp_path,)})
    for settings, plan in (
        (config, {"resident": frozenset({"embed"})}),
        (config, {"snapshot": True, "chunk_numel": 3000}),
        (stored, {"nvme_moments": 2, "nvme_lo": 1}),
    ):
        with engine_with(settings, checkpoint=checkpoint, **plan) as engine:
            again = Checkpoint(engine.checkpoint(tmp_path / "again").finish())
            engine.step(BATCHES[1])
            assert different(state_of(engine), plain) == [], plan
        for unit in engine.spec.units:
            one, other = (p / "units" / unit.name for p in (path, again.folder))
            assert one.read_bytes() == other.read_bytes(), unit.name
    exported = checkpoint.export(tmp_path / "exported")
    assert stored_weights(exported).keys() == stored_weights(folder).keys()
    other = config.model_copy(update={"optimizer": "adamw"})
    message = r"of the optimizer adamw8bit, the settings ask for adamw;"
    with (
        pytest.raises(CheckpointError, match=message),
        engine_with(other, checkpoint=checkpoint),
    ):
        pass
