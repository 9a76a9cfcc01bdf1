"""The engine on a real GPU: against plain PyTorch, and the same bits wherever things are placed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import slideformer.engine as engine_module
from slideformer.config import EngineConfig
from slideformer.engine import Engine
from slideformer.graph.buffers import Tier
from slideformer.kernels.split import join_master
from slideformer.models.data.batches import Batch
from slideformer.models.shapes import shape_config
from tests.models.tiny import save, tiny_config, tiny_model
from tests.support.engines import packed_batch
from tests.support.specs import draft

pytestmark = pytest.mark.gpu

ROWS, SEQ_LEN, VOCAB, STEPS = 8, 64, 512, 4
PLACEMENTS: list[dict[str, Any]] = [
    {},
    {"window": 2, "offloaded": 0},
    {"chunk_numel": 5000, "staging_slots": 2},
    {"resident": frozenset({"embed", "L00", "L02"})},
    {"resident": frozenset({"embed", "norm", "L00", "L01", "L02"}), "kept": 3},
    {"kept": 1, "spilled": 2},
]
ON_NVME: list[dict[str, Any]] = [
    {"nvme_moments": 3, "nvme_lo": 3, "nvme_hi": 3, "offloaded": 3, "nvme_boundaries": 2},
    {"nvme_moments": 2, "nvme_lo": 2, "nvme_hi": 1, "chunk_numel": 5000, "nvme_slots": 1},
    {"nvme_moments": 1, "nvme_lo": 1, "nvme_hi": 1, "resident": frozenset({"embed", "L00"})},
]


DOCUMENTS = [[30, 20, 14], [64], [5, 50], [40, 24], [1, 63], [], [33], [8] * 8]


def batch(seed: int, packed: bool = False) -> Batch:
    if packed:
        return packed_batch(seed, DOCUMENTS, vocab=VOCAB, seq_len=SEQ_LEN)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (ROWS, SEQ_LEN), generator=generator)
    targets = torch.full_like(ids, -100)
    targets[:, :-1] = ids[:, 1:]
    targets[1, 20:] = -100
    return Batch(ids, targets, ids.numel(), int((targets != -100).sum()), ROWS)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        tie_word_embeddings=request.param,
    )
    folder = tmp_path_factory.mktemp("gpu") / "model"
    save(tiny_model(config), folder, torch.bfloat16)
    return folder


@pytest.fixture
def deterministic() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


def train(
    folder: Path, monkeypatch: pytest.MonkeyPatch, placement: dict[str, Any], **settings: Any
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of a few steps, and the FP32 masters after them."""
    planned = engine_module.plan_for
    monkeypatch.setattr(
        engine_module, "plan_for", lambda *args: replace(draft(planned(*args)), **placement)
    )
    settings = {"micro_batch": 2, "lr": 1e-3, "deterministic": True, **settings}
    config = EngineConfig(model=folder, batch_size=ROWS, seq_len=SEQ_LEN, device="cuda", **settings)
    with Engine(config) as engine:
        handles = [engine.step(batch(seed, config.packing)) for seed in range(STEPS)]
        losses = [handle.loss() for handle in handles]
        engine.synchronize()
        weights = {}
        for name in engine._memory.states:
            state = engine._memory.whole(name)
            hi, lo = state.hi.cpu(), state.lo.cpu()
            joined = torch.empty(len(hi))
            join_master(hi, lo if len(lo) else torch.zeros_like(hi), joined)
            weights[name] = joined
    monkeypatch.undo()
    return losses, weights


@pytest.mark.usefixtures("deterministic")
def test_placement_and_policy_do_not_change_a_bit(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses, weights = train(checkpoint, monkeypatch, PLACEMENTS[0])
    for placement in PLACEMENTS[1:]:
        again, others = train(checkpoint, monkeypatch, placement, policy="fifo", threads=3)
        assert again == losses, placement
        for name, value in weights.items():
            assert torch.equal(others[name], value), (placement, name)


@pytest.mark.usefixtures("deterministic")
def test_placement_does_not_change_a_bit_of_deferred_updates(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clipped at every step; where nothing is, it gives the bits of overlapped updates."""
    losses, weights = train(checkpoint, monkeypatch, PLACEMENTS[0], max_grad_norm=0.1)
    for placement in PLACEMENTS[1:]:
        again, others = train(checkpoint, monkeypatch, placement, max_grad_norm=0.1)
        assert again == losses, placement
        for name, value in weights.items():
            assert torch.equal(others[name], value), (placement, name)
    loose, unclipped = train(checkpoint, monkeypatch, PLACEMENTS[3], max_grad_norm=1e9)
    overlapped, expected = train(checkpoint, monkeypatch, PLACEMENTS[3])
    assert loose == overlapped != losses
    for name, value in expected.items():
        assert torch.equal(unclipped[name], value), name


TRAINED: dict[str, dict[str, Any]] = {
    "groups": {
        "weight_decay": 0.1,
        "parameter_groups": [
            {"pattern": "*.[qv]_proj.weight", "lr_scale": 0.5, "weight_decay": 0.0},
            {"pattern": "model.embed_tokens.weight", "lr": 2e-3},
        ],
    },
    "frozen": {
        "parameter_groups": [
            {"pattern": pattern, "frozen": True}
            for pattern in ("model.embed_tokens.*", "model.layers.0.*", "*.k_proj.*", "*norm.*")
        ]
    },
    "lion": {"optimizer": "lion", "lr": 1e-4},
    "adamw8bit": {"optimizer": "adamw8bit"},
    "lora": {"lora": {"rank": 8, "alpha": 16}},
    "packing": {"packing": True},
}


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("name", TRAINED)
def test_placement_does_not_change_a_bit_of_other_ways_to_train(
    name: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = TRAINED[name]
    losses, weights = train(checkpoint, monkeypatch, PLACEMENTS[0], **settings)
    assert losses != train(checkpoint, monkeypatch, PLACEMENTS[0])[0]
    for placement in PLACEMENTS[1:]:
        again, others = train(checkpoint, monkeypatch, placement, **settings)
        assert again == losses, placement
        for unit, value in weights.items():
            assert torch.equal(others[unit], value), (placement, unit)


@pytest.mark.usefixtures("deterministic")
def test_weights_boundaries_and_state_on_nvme_do_not_change_a_bit(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    losses, weights = train(checkpoint, monkeypatch, PLACEMENTS[0])
    for placement in ON_NVME:
        again, others = train(checkpoint, monkeypatch, placement, nvme=(tmp_path,))
        assert again == losses, placement
        for name, value in weights.items():
            assert torch.equal(others[name], value), (placement, name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("deterministic")
def test_boundaries_that_go_through_kvikio_do_not_change_a_bit(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In its POSIX mode too, where a plan would take the way through host memory."""
    pytest.importorskip("kvikio")
    placement = {"offloaded": 3, "nvme_boundaries": 2}
    losses, weights = train(checkpoint, monkeypatch, placement, nvme=(tmp_path,))
    placement |= {"nvme_direct": True}
    again, others = train(checkpoint, monkeypatch, placement, nvme=(tmp_path,))
    assert again == losses
    for name, value in weights.items():
        assert torch.equal(others[name], value), name


@pytest.mark.usefixtures("deterministic")
def test_follows_plain_pytorch(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses, _ = train(checkpoint, monkeypatch, {}, compute="fp32")
    model = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    for seed, loss in enumerate(losses):
        data = batch(seed)
        optimizer.zero_grad()
        logits = model(input_ids=data.input_ids.cuda()).logits.float()
        expected = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), data.targets.cuda().flatten(), ignore_index=-100
        )
        expected.backward()
        optimizer.step()
        assert loss == pytest.approx(expected.item(), rel=2e-5), seed


def test_stays_within_its_plan() -> None:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    config = EngineConfig(
        model="none", batch_size=8, seq_len=1024, gpu_memory=5 << 30, cpu_memory=24 << 30,
        device="cuda",
    )  # fmt: skip
    shape = shape_config("llama3-1b")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, shape.vocab_size, (8, 1024), generator=generator)
    data = Batch(ids, ids.roll(-1, 1), ids.numel(), ids.numel(), 8)
    with Engine(config, initial=shape) as engine:
        for _ in range(3):
            engine.step(data)
        engine.synchronize()
        free, total = torch.cuda.mem_get_info()
        context = total - free - torch.cuda.memory_reserved()
        peak = torch.cuda.max_memory_reserved() + context
        assert peak <= engine.plan.peaks[Tier.GPU] <= config.gpu_memory
        assert peak >= 0.85 * engine.plan.peaks[Tier.GPU]
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() <= before + (64 << 20)  # cuBLAS keeps a workspace
