"""Frozen parameters: never changed, without gradient or state; the others train as in PyTorch."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from slideformer.checkpointing import Checkpoint
from slideformer.engine import Engine
from slideformer.graph.buffers import Tier
from slideformer.graph.errors import CheckpointError
from slideformer.graph.tasks import TaskKind
from slideformer.memory.layout import lay_out, places
from tests.models.tiny import save, tiny_config, tiny_model
from tests.support.engines import (
    check_equal,
    config_for,
    different,
    engine_with,
    make_batch,
    state_of,
    stored_weights,
    train,
    train_reference,
    write_model,
)

LR = 5e-4
BATCHES = [make_batch(seed) for seed in range(4)]

FROZEN: dict[str, list[str]] = {
    "the embedding": ["model.embed_tokens.*"],
    "the embedding and the first layers": ["model.embed_tokens.*", "model.layers.[01].*"],
    "a layer in the middle, the final norm": ["model.layers.1.*", "model.norm.weight"],
    "parts of operands": [
        "*.[qv]_proj.*",
        "*.k_proj.bias",
        "*.gate_proj.weight",
        "*.2.*layernorm.weight",
        "*.o_*",
    ],
}
TRAINED: dict[str, list[str]] = {
    "queries of the last layer": ["model.layers.2.*.q_proj.weight"],
    "norms": ["*norm.weight"],
    "the final norm": ["model.norm.weight"],
    "the output matrix": ["lm_head.weight"],
}
CASES = {name: [*({"pattern": p, "frozen": True} for p in names)] for name, names in FROZEN.items()}
CASES |= {
    f"all but {name}": [{"pattern": p} for p in names] + [{"pattern": "*", "frozen": True}]
    for name, names in TRAINED.items()
}


def is_frozen(name: str, groups: list[dict[str, Any]]) -> bool:
    """Whether these groups freeze a parameter."""
    found = (g for g in groups if fnmatchcase(name, g["pattern"]))
    return bool(next(found, {}).get("frozen"))


def check(
    folder: Path, groups: list[dict[str, Any]], max_norm: float | None = None, **plan: Any
) -> None:
    """Train by these groups, in FP32, and compare with a plain loop and with the start."""
    start = stored_weights(folder)
    frozen = {name for name in start if is_frozen(name, groups)}
    assert 0 < len(frozen) < len(start)
    reference = train_reference(
        folder, BATCHES, lr=LR, weight_decay=0.1, frozen=frozen, max_norm=max_norm
    )
    settings: dict[str, Any] = {"weight_decay": 0.1, "max_grad_norm": max_norm}
    config = config_for(folder, lr=LR, parameter_groups=groups, **settings)
    found = train(config, BATCHES, **plan)
    check_equal(found, reference)
    assert set(different(found.weights, start)) == start.keys() - frozen


@pytest.mark.parametrize("name", CASES)
def test_the_rest_trains_as_in_plain_pytorch(name: str, tmp_path: Path) -> None:
    check(write_model(tmp_path / "model", "llama-biases"), CASES[name])


@pytest.mark.parametrize("name", ["the embedding", "all but norms", "parts of operands"])
def test_with_the_matrices_tied_and_swept_in_chunks(name: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "qwen3-biases", tied=True)
    check(folder, CASES[name], vocab_chunks=3, chunk_numel=3000, offloaded=2)


@pytest.mark.parametrize("pattern", ["*.experts.*", "*.w2.weight", "*_moe.gate.weight"])
def test_experts_and_routers(pattern: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "mixtral")
    check(folder, [{"pattern": pattern, "frozen": True}])


@pytest.mark.parametrize("tied", [False, True])
def test_clipping_counts_what_is_trained_alone(tied: bool, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "llama-biases", tied=tied)
    check(folder, CASES["parts of operands"], max_norm=0.05)


@pytest.mark.parametrize(
    ("name", "tied"),
    [*((name, False) for name in CASES), ("the embedding", True), ("all but norms", True)],
)
def test_where_things_lie_changes_no_bit(name: str, tied: bool, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "qwen2", tied=tied)
    config = config_for(folder, compute="bf16", parameter_groups=CASES[name])
    plans: list[dict[str, Any]] = [
        {},
        {"chunk_numel": 700, "offloaded": 2, "kept": 1, "window": 3},
        {"resident": frozenset({"embed", "L00", "L02"}), "offloaded": 3, "spilled": 2, "kept": 1},
    ]
    outcomes: list[dict[str, Tensor]] = []
    for plan in plans:
        with engine_with(config, **plan) as engine:
            handles = [engine.step(batch) for batch in BATCHES[:2]]
            losses = [handle.loss() for handle in handles]
            losses += [engine.evaluate(BATCHES[2]).loss()]
            outcomes.append(state_of(engine) | {"losses": torch.tensor(losses)})
    for outcome in outcomes[1:]:
        assert different(outcome, outcomes[0]) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_frozen_values_are_saved_as_they_were_stored(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = save(tiny_model(tiny_config("llama")), tmp_path / "model", dtype)
    groups = [{"pattern": "model.layers.1.*"}, {"pattern": "*", "frozen": True}]
    config = config_for(folder, compute="bf16", parameter_groups=groups)
    with engine_with(config, resident=frozenset({"embed", "L01", "L02"})) as engine:
        engine.step(BATCHES[0])
        saved = engine.save(tmp_path / "out")
    before = load_file(folder / "model.safetensors")
    after: dict[str, Tensor] = {}
    for path in saved.glob("*.safetensors"):
        after |= load_file(path)
    changed = different(after, before)
    assert changed
    assert all(name.startswith("model.layers.1.") for name in changed)


def host_bytes(engine: Engine) -> int:
    """What all graphs take in host memory."""
    sizes = lay_out(places(engine._graphs)).sizes
    return sum(sizes[tier] for tier in (Tier.CPU, Tier.PINNED))


def test_frozen_units_take_two_bytes_and_no_gradient(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", vocab_size=3001)
    groups = [{"pattern": "model.layers.2.*"}, {"pattern": "*", "frozen": True}]
    config = config_for(folder, compute="bf16", parameter_groups=groups)
    with engine_with(config) as engine, engine_with(config_for(folder, compute="bf16")) as whole:
        frozen = sum(unit.numel for unit in engine.spec.units if unit.frozen)
        spared = host_bytes(whole) - host_bytes(engine)
        # Lower halves and moments, and gradients on their way to the update.
        assert spared >= 10 * frozen + 2 * (frozen - engine.spec.embed.numel)
        updated = [t.name for t in engine.graph.tasks if t.kind is TaskKind.CPU_UPDATE]
        assert updated == ["update.L02.c0"]
        assert [t.name for t in engine.graph.tasks if t.op == "bwd"] == ["bwd.L02.m0", "bwd.L02.m1"]


@pytest.mark.parametrize("compute", ["bf16", "fp32"])
def test_a_checkpoint_holds_what_frozen_units_have(compute: str, tmp_path: Path) -> None:
    folder = save(tiny_model(tiny_config("llama")), tmp_path / "model", torch.bfloat16)
    groups = [{"pattern": "model.layers.1.*"}, {"pattern": "*", "frozen": True}]
    config = config_for(folder, compute=compute, parameter_groups=groups)
    resident = frozenset({"embed", "L01"} if compute == "bf16" else ())
    with engine_with(config, resident=resident) as engine:
        engine.step(BATCHES[0])
        path = engine.checkpoint(tmp_path / "step-1").finish()
        engine.step(BATCHES[1])
        plain = state_of(engine)
    checkpoint = Checkpoint(path)
    resident = frozenset({"L00", "L02"} if compute == "bf16" else ())
    with engine_with(config, checkpoint=checkpoint, resident=resident) as engine:
        engine.step(BATCHES[1])
        assert different(state_of(engine), plain) == []
    sizes = {p.name: p.stat().st_size for p in (path / "units").iterdir()}
    frozen = 2 if compute == "bf16" else 4
    for unit in engine.spec.units:
        assert sizes[unit.name] == unit.numel * (frozen if unit.frozen else 12)
    exported = checkpoint.export(tmp_path / "out")
    with engine_with(config, checkpoint=checkpoint) as engine:
        saved = engine.save(tmp_path / "saved")
    assert different(stored_weights(exported), stored_weights(saved)) == []
    with (
        pytest.raises(CheckpointError, match=r"frozen units are embed,.*settings are none; resume"),
        engine_with(config_for(folder, compute=compute), checkpoint=checkpoint),
    ):
        pass
