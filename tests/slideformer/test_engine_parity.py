"""Training in FP32 equals a plain PyTorch loop on the transformers model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.models.tiny import padding
from tests.support.engines import (
    check_equal,
    check_moved,
    config_for,
    different,
    engine_with,
    make_batch,
    reference_loss,
    stored_weights,
    too_far,
    train,
    train_reference,
    weights_of,
    write_model,
)

LR = 5e-4
STEPS = 10
BATCHES = [make_batch(seed) for seed in range(STEPS)]

LLAMA3_ROPE = {
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
}
SLIDING = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama-biases", {}),
    "llama, tied": ("llama-biases", {"tied": True}),
    "llama, scaled rope": ("llama", LLAMA3_ROPE),
    "qwen2": ("qwen2", {}),
    "qwen2, tied, some layers windowed": ("qwen2", {"tied": True, **SLIDING}),
    "qwen3": ("qwen3-biases", {}),
    "qwen3, tied": ("qwen3-biases", {"tied": True}),
    "mistral, windowed": ("mistral", {}),
    "mistral, tied, windowed": ("mistral", {"tied": True}),
    "phi3": ("phi3", {}),
    "mixtral": ("mixtral", {}),
    "mixtral, tied": ("mixtral", {"tied": True}),
    "qwen3-moe": ("qwen3_moe-normalised", {}),
    "qwen3-moe, tied": ("qwen3_moe", {"tied": True}),
    "gemma2": ("gemma2", {}),
    "gemma2, tied, padding token": ("gemma2", {"tied": True, "pad_token_id": 0}),
    "gemma3": ("gemma3_text-biases", {}),
    "gemma3, tied": ("gemma3_text", {"tied": True}),
    "phi3, tied, windowed, partial and scaled rope": ("phi3-partial", {"tied": True}),
}


@pytest.mark.parametrize("name", MODELS)
def test_ten_steps_equal_plain_pytorch(name: str, tmp_path: Path) -> None:
    variant, settings = MODELS[name]
    folder = write_model(tmp_path / "model", variant, **settings)
    reference = train_reference(folder, BATCHES, lr=LR)
    start = stored_weights(folder)
    assert reference.with_gradient == start.keys()
    check_moved(reference, start)
    check_equal(train(config_for(folder, lr=LR), BATCHES), reference)


def test_a_frozen_engine_fails_the_comparison(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "llama-biases")
    reference = train_reference(folder, BATCHES, lr=LR)
    found = train(config_for(folder, lr=0.0), BATCHES)
    assert too_far(found.weights, stored_weights(folder)) == [], "it is frozen"
    assert len(too_far(found.weights, reference.weights)) == len(reference.weights)
    assert found.losses[1:] != pytest.approx(reference.losses[1:], rel=1e-5)


@pytest.mark.parametrize("settings", [{}, {"tied": True}], ids=["untied", "tied"])
def test_weight_decay_applies_to_every_matrix(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "qwen3-biases", **settings)
    batches = BATCHES[:4]
    reference = train_reference(folder, batches, lr=LR, weight_decay=0.5)
    check_equal(train(config_for(folder, lr=LR, weight_decay=0.5), batches), reference)
    without = train(config_for(folder, lr=LR), batches).weights
    matrices = {name for name, value in reference.weights.items() if value.dim() > 1}
    assert {line.split(":")[0] for line in too_far(without, reference.weights)} == matrices


@pytest.mark.parametrize("settings", [{}, {"tied": True}], ids=["untied", "tied"])
@pytest.mark.parametrize(("vocab_chunks", "head_tile"), [(1, 32), (1, 7), (3, 32), (4, 7)])
def test_the_output_matrix_in_chunks_and_tiles(
    vocab_chunks: int, head_tile: int, settings: dict[str, Any], tmp_path: Path
) -> None:
    """Biases and norms leave padding, which chunks of the matrix write to when they share slots."""
    folder = write_model(tmp_path / "model", "llama-biases", **settings)
    batches = BATCHES[:4]
    reference = train_reference(folder, batches, lr=LR)
    plan = {"vocab_chunks": vocab_chunks, "head_tile": head_tile, "chunk_numel": 2000}
    found = train(config_for(folder, lr=LR), batches, **plan)
    check_equal(found, reference)
    assert found.losses == pytest.approx(reference.losses, rel=1e-6)


@pytest.mark.parametrize(
    ("variant", "vocab_chunks", "tied"),
    [("llama", 1, False), ("llama", 3, True), ("gemma2", 1, True), ("gemma2", 3, False)],
)
def test_label_smoothing_and_z_loss(
    variant: str, vocab_chunks: int, tied: bool, tmp_path: Path
) -> None:
    folder = write_model(tmp_path / "model", variant, tied=tied)
    batches = BATCHES[:4]
    reference = train_reference(folder, batches, lr=LR, smoothing=0.1, z=0.01)
    config = config_for(folder, lr=LR, label_smoothing=0.1, z_loss=0.01)
    with engine_with(config, vocab_chunks=vocab_chunks) as engine:
        before = engine.evaluate(batches[0]).loss()
        losses = [engine.step(batch).loss() for batch in batches]
        weights = weights_of(engine)
    assert losses == pytest.approx(reference.losses, rel=1e-5)
    assert too_far(weights, reference.weights) == []
    assert before == pytest.approx(reference_loss(folder, batches[0]), rel=1e-5)
    plain = train(config_for(folder, lr=LR), batches).weights
    assert len(too_far(plain, reference.weights)) > len(reference.weights) // 2


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("pad_token_id", [None, 0])
def test_right_padding_equals_an_attention_mask(
    pad_token_id: int | None, tied: bool, tmp_path: Path
) -> None:
    """The look-up gives the embedding's padding row no gradient; a tied output matrix does."""
    folder = write_model(tmp_path / "model", tied=tied, pad_token_id=pad_token_id)
    lengths = [[16, 9, 2, 13], [5, 16, 16, 0], [3, 3, 0, 0]]
    batches = [make_batch(seed, lengths=rows) for seed, rows in enumerate(lengths)]
    reference = train_reference(folder, batches, lr=LR)
    check_equal(train(config_for(folder, lr=LR), batches), reference)


@pytest.mark.parametrize("tied", [False, True])
def test_a_padding_token_inside_a_row_gets_no_gradient_from_the_look_up(
    tied: bool, tmp_path: Path
) -> None:
    folder = write_model(tmp_path / "model", tied=tied, pad_token_id=7)
    batches = []
    for batch in (make_batch(seed) for seed in range(3)):
        batch.input_ids[:, 5] = 7
        batch.targets[:, 4] = 7
        batches.append(replace(batch, target_tokens=int((batch.targets != -100).sum())))
    reference = train_reference(folder, batches, lr=LR)
    check_equal(train(config_for(folder, lr=LR), batches), reference)


@pytest.mark.parametrize("variant", ["phi3-partial", "gemma2", "mixtral", "qwen3_moe"])
def test_trained_weights_are_saved_for_transformers(variant: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", variant, tied=True)
    with engine_with(config_for(folder, lr=LR)) as engine:
        for batch in BATCHES[:2]:
            engine.step(batch)
        evaluated = engine.evaluate(BATCHES[2]).loss()
        saved = engine.save(tmp_path / "out")
        weights = weights_of(engine)
    stored = stored_weights(saved)
    assert different(weights, stored) == []
    assert len(different(stored, stored_weights(folder))) == len(stored)
    assert reference_loss(saved, BATCHES[2]) == pytest.approx(evaluated, rel=1e-5)


@pytest.mark.parametrize("vocab_chunks", [1, 3])
def test_an_evaluation_gives_the_loss_of_the_reference(vocab_chunks: int, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "mistral")
    batch = make_batch(99, lengths=[16, 3, 11, 0])
    with engine_with(config_for(folder), vocab_chunks=vocab_chunks) as engine:
        assert engine.evaluate(batch).loss() == pytest.approx(
            reference_loss(folder, batch), rel=1e-5
        )


@pytest.mark.parametrize("tied", [False, True])
def test_padding_between_operands_stays_zero_and_out_of_the_norm(
    tied: bool, tmp_path: Path
) -> None:
    """The matrix's chunks use the layers' accumulators before them and reach into that padding."""
    folder = write_model(tmp_path / "model", "llama-biases", vocab_size=1501, tied=tied)
    batches = [make_batch(seed, vocab=1501) for seed in range(2)]
    reference = train_reference(folder, batches, lr=LR)
    with engine_with(config_for(folder, lr=LR), vocab_chunks=2) as engine:
        layer = engine.graph.buffers["acc.L00.c0"]
        swept = engine.graph.buffers[f"acc.{'embed' if tied else 'head'}.c0"]
        assert (layer.slot, swept.slot) == ("acc.0", "acc.0")
        assert swept.stop > layer.stop, "so there is something to be seen"
        norms = [engine.step(batch).gradient_norm() for batch in batches]
        engine.synchronize()
        masters = {n: (state.hi, state.lo) for n, state in engine._memory.states.items()}
        moments = {n: (state.m, state.v) for n, state in engine._memory.states.items()}
        assert len(padding(engine.spec, masters))
        assert not padding(engine.spec, masters).any()
        assert not padding(engine.spec, moments).any()
    assert norms == pytest.approx(reference.norms, rel=1e-5)


def test_a_long_row_passes_the_mlp_in_tiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slideformer.graph.plan.MLP_TILE", 5)
    folder = write_model(tmp_path / "model", "llama-biases")
    batches = BATCHES[:4]
    reference = train_reference(folder, batches, lr=LR)
    check_equal(train(config_for(folder, lr=LR), batches, micro_rows=1), reference)
