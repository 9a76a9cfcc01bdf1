"""Packed rows train as the same documents do in rows of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from slideformer.config import EngineConfig
from slideformer.graph.errors import DataError
from slideformer.models.data.batches import Batch
from tests.slideformer.test_engine_balance import BALANCED
from tests.slideformer.test_engine_parity import LLAMA3_ROPE, SLIDING
from tests.support.engines import (
    check_equal,
    config_for,
    engine_with,
    make_batch,
    packed_batch,
    stored_weights,
    tolerance,
    too_far,
    train,
    write_model,
)

LR = 5e-4
LENGTHS = [
    [[9, 7], [5, 2, 1, 8], [3], [12, 4]],
    [[16], [6, 6, 3], [], [1, 15]],
    [[8, 8], [4, 4, 4, 4], [10], [13, 2]],
]
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, tied, scaled rope": ("llama-biases", {"tied": True, **LLAMA3_ROPE}),
    "qwen2, some layers windowed": ("qwen2", SLIDING),
    "qwen3": ("qwen3-biases", {}),
    "mistral, windowed": ("mistral", {}),
    "mixtral, windowed": ("mixtral", {}),
    "qwen3-moe, balanced": ("qwen3_moe", BALANCED),
    "gemma2, capped, some layers windowed": ("gemma2", {}),
    "gemma3, two rotary embeddings": ("gemma3_text", {"tied": True}),
}


def apart(documents: list[list[int]]) -> list[list[int]]:
    """The same documents, one a row, in a multiple of four rows."""
    rows = [[length] for row in documents for length in row]
    return rows + [[]] * (-len(rows) % 4)


def settings_for(folder: Path, batches: list[Batch], packing: bool) -> EngineConfig:
    """Settings for batches of that size."""
    rows = len(batches[0].input_ids)
    return config_for(folder, lr=LR, batch_size=rows, packing=packing)


@pytest.mark.parametrize("name", MODELS)
def test_packed_documents_train_as_those_in_rows_of_their_own(name: str, tmp_path: Path) -> None:
    variant, settings = MODELS[name]
    folder = write_model(tmp_path / "model", variant, **settings)
    packed = [packed_batch(seed, rows) for seed, rows in enumerate(LENGTHS)]
    alone = [
        packed_batch(seed, [*apart(rows), *[[]] * 12][:12]) for seed, rows in enumerate(LENGTHS)
    ]
    plain = [Batch(b.input_ids, b.targets, b.real_tokens, b.target_tokens, b.rows) for b in alone]
    assert [b.target_tokens for b in packed] == [b.target_tokens for b in plain]
    ours = train(settings_for(folder, packed, True), packed)
    reference = train(settings_for(folder, plain, False), plain)
    check_equal(ours, reference)
    start = stored_weights(folder)
    moved = {
        name: float((value - start[name]).norm()) / tolerance(start[name])
        for name, value in reference.weights.items()
    }
    assert min(moved.values()) > 50, "the comparison means something"
    # Rows whose documents see each other train to something else.
    blind = [Batch(b.input_ids, b.targets, b.real_tokens, b.target_tokens, b.rows) for b in packed]
    others = train(settings_for(folder, blind, True), blind)
    assert others.losses != pytest.approx(reference.losses, rel=1e-5)
    assert len(too_far(others.weights, reference.weights)) > len(start) // 2


def test_a_batch_that_an_engine_cannot_use_is_no_step(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    batch = packed_batch(0, LENGTHS[0])
    with engine_with(config_for(folder)) as engine, pytest.raises(DataError, match="set packing"):
        engine.step(batch)
    assert batch.positions is not None
    with engine_with(config_for(folder, packing=True)) as engine:
        for wrong, message in (
            (batch.positions + 1, "do not count up from 0"),
            (batch.positions * 2, "do not count up from 0"),
            (batch.positions[:, :-1], "they must be"),
            (batch.positions.to(torch.int32), "int32"),
        ):
            fields = (batch.input_ids, batch.targets, batch.real_tokens, batch.target_tokens)
            with pytest.raises(DataError, match=message):
                engine.step(Batch(*fields, batch.rows, wrong))
        assert engine.step(make_batch(0)).number == 1, "a row without positions is one document"
