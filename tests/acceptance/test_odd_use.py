"""Shapes and habits of use that no other test has: odd sizes, and a busy engine nobody reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from slideformer.config import EngineConfig
from slideformer.engine import Engine
from slideformer.graph.errors import DataError
from slideformer.models.data.batches import Batch
from tests.models.tiny import save, tiny_config, tiny_model
from tests.support.engines import Weights, different, stored_weights, too_far, weights_of

VOCAB, LR = 331, 1e-3
ODD: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 96,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 40,
    "intermediate_size": 200,
    "max_position_embeddings": 128,
}


def write_odd(folder: Path, variant: str, **settings: Any) -> Path:
    config = tiny_config(variant, **{**ODD, **settings})
    return save(tiny_model(config), folder, torch.float32)


def odd_batch(seed: int, rows: int, seq_len: int) -> Batch:
    """Rows of random lengths, the first one full, some perhaps empty."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCAB, (rows, seq_len), generator=generator)
    targets = torch.full_like(ids, -100)
    lengths = [seq_len, *torch.randint(0, seq_len + 1, (rows - 1,), generator=generator).tolist()]
    for row, length in enumerate(lengths):
        ids[row, length:] = 0
        targets[row, : max(0, length - 1)] = ids[row, 1:length]
    return Batch(ids, targets, sum(lengths), int((targets != -100).sum()), rows)


def plain_loop(folder: Path, batches: Sequence[Batch]) -> tuple[list[float], Weights]:
    """Losses and weights of transformers and `torch.optim.AdamW`, one row at a time, no padding."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        total = 0.0
        for ids, targets in zip(batch.input_ids, batch.targets, strict=True):
            length = int((targets != -100).sum()) + 1
            if length == 1:
                continue
            logits = model(input_ids=ids[None, :length]).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits, ids[1:length], reduction="sum")
            (loss / batch.target_tokens).backward()
            total += loss.item() / batch.target_tokens
        losses.append(total)
        optimizer.step()
    return losses, {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("variant", "settings", "rows", "micro", "seq_len"),
    [
        ("llama", {"tied": True, "num_hidden_layers": 5}, 7, 1, 17),
        ("qwen2", {"num_hidden_layers": 1}, 3, 3, 100),
        ("mistral", {"tied": True, "num_hidden_layers": 1, "sliding_window": 7}, 6, 2, 100),
    ],
)
def test_odd_sizes_equal_a_plain_loop_by_rows(
    variant: str, settings: dict[str, Any], rows: int, micro: int, seq_len: int, tmp_path: Path
) -> None:
    folder = write_odd(tmp_path / "model", variant, **settings)
    batches = [odd_batch(seed, rows, seq_len) for seed in range(4)]
    losses, weights = plain_loop(folder, batches)
    config = EngineConfig(
        model=folder,
        batch_size=rows,
        seq_len=seq_len,
        micro_batch=micro,
        lr=LR,
        compute="fp32",
        device="cpu",
    )
    with Engine(config) as engine:
        handles = [engine.step(batch) for batch in batches]
        assert [h.loss() for h in handles] == pytest.approx(losses, rel=1e-5)
        assert too_far(weights_of(engine), weights) == []


def test_evaluating_and_saving_between_unread_steps_changes_nothing(tmp_path: Path) -> None:
    folder = write_odd(tmp_path / "model", "qwen2", tied=True, num_hidden_layers=2)
    config = EngineConfig(model=folder, batch_size=5, seq_len=17, lr=LR, device="cpu")
    batches = [odd_batch(seed, 5, 17) for seed in range(6)]
    with Engine(config) as quiet, Engine(config) as busy:
        for number, batch in enumerate(batches):
            quiet.step(batch)
            busy.step(batch)
            evaluation = busy.evaluate(batches[0])
            if number == 2:
                busy.save(tmp_path / "middle")
                then = evaluation.loss()
        busy.save(tmp_path / "end")
        busy.save(tmp_path / "again")
        quiet.save(tmp_path / "quiet")
    end = stored_weights(tmp_path / "end")
    assert different(end, stored_weights(tmp_path / "quiet")) == []
    assert different(end, stored_weights(tmp_path / "again")) == []
    assert different(end, stored_weights(tmp_path / "middle"))
    with Engine(config.model_copy(update={"model": tmp_path / "middle"})) as reloaded:
        assert reloaded.evaluate(batches[0]).loss() == then


def test_batches_that_would_train_on_the_wrong_thing_are_refused(tmp_path: Path) -> None:
    folder = write_odd(tmp_path / "model", "llama", num_hidden_layers=1)
    config = EngineConfig(model=folder, batch_size=2, seq_len=8, lr=LR, device="cpu")
    good = odd_batch(0, 2, 8)
    negative = good.targets.clone()
    negative[0, 0] = -5
    with Engine(config) as engine:
        loss = engine.evaluate(good).loss()
        for changed, message in (
            ({"targets": negative}, "token id -5"),
            ({"input_ids": good.input_ids.float()}, "int64"),
            ({"targets": good.targets.int()}, "int64"),
            ({"target_tokens": good.target_tokens + 1}, "targets"),
        ):
            with pytest.raises(DataError, match=message):
                engine.step(replace(good, **changed))
        transposed = replace(good, input_ids=good.input_ids.t().contiguous().t())
        assert engine.evaluate(transposed).loss() == loss
