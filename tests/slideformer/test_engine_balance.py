"""The loss that balances experts' load equals that of transformers over the whole step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from slideformer.models.data.batches import Batch
from tests.models.tiny import by_stored_name
from tests.support.engines import (
    ROWS,
    SEQ_LEN,
    Weights,
    config_for,
    engine_with,
    make_batch,
    too_far,
    train,
    weights_of,
    write_model,
)

LR = 5e-4
BALANCED = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
BATCHES = [make_batch(0), make_batch(1, lengths=[16, 9, 2, 13]), *map(make_batch, range(2, 10))]


def reference(folder: Path, batches: list[Batch]) -> tuple[list[float], Weights]:
    """A plain loop with the whole step in one forward, as the statistics are those of a step."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    coefficient, losses = model.config.router_aux_loss_coef, []
    for batch in batches:
        targets = batch.targets
        last = (targets != -100).int().cumsum(1).argmax(1, keepdim=True) + 1
        mask = (torch.arange(SEQ_LEN) <= last).long()
        output = model(input_ids=batch.input_ids, attention_mask=mask)
        total = torch.nn.functional.cross_entropy(
            output.logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum"
        )
        loss = total / batch.target_tokens + coefficient * output.aux_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    named = {name: p.detach() for name, p in model.named_parameters()}
    return losses, by_stored_name(model.config, named)


@pytest.mark.parametrize(
    ("variant", "settings", "plan"),
    [
        ("mixtral", {}, {}),
        ("mixtral", {"tied": True}, {"micro_rows": 4}),
        ("qwen3_moe", {}, {"vocab_chunks": 3}),
        ("qwen3_moe-normalised", {"tied": True}, {"kept": 1, "spilled": 1, "offloaded": 2}),
    ],
)
def test_training_equals_transformers_with_router_logits(
    variant: str, settings: dict[str, Any], plan: dict[str, Any], tmp_path: Path
) -> None:
    folder = write_model(tmp_path / "model", variant, **settings, **BALANCED)
    expected, weights = reference(folder, BATCHES)
    found = train(config_for(folder, lr=LR), BATCHES, **plan)
    assert found.losses == pytest.approx(expected, rel=1e-5)
    assert too_far(found.weights, weights) == []


def test_accumulated_batches_are_balanced_together(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "mixtral", **BALANCED)
    batches = [make_batch(seed, rows=2 * ROWS) for seed in range(4)]
    expected, weights = reference(folder, batches)
    with engine_with(config_for(folder, lr=LR, accumulate=2)) as engine:
        assert engine.plan.micro_batches == 4
        losses = [engine.step(batch).loss() for batch in batches]
        ours = weights_of(engine)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert too_far(ours, weights) == []


def test_without_router_logits_there_is_no_such_loss(tmp_path: Path) -> None:
    """And the comparison above would notice if it were left out."""
    folder = write_model(tmp_path / "balanced", "mixtral", **BALANCED)
    expected, weights = reference(folder, BATCHES)
    plain = write_model(tmp_path / "plain", "mixtral", router_aux_loss_coef=0.5)
    found = train(config_for(plain, lr=LR), BATCHES)
    assert found.losses != pytest.approx(expected, rel=1e-2)
    assert len(too_far(found.weights, weights)) > len(weights) // 2


def test_an_evaluation_is_the_loss_of_language_alone(tmp_path: Path) -> None:
    batch, found = make_batch(7), []
    for name, settings in (("balanced", BALANCED), ("plain", {})):
        folder = write_model(tmp_path / name, "mixtral", **settings)
        with engine_with(config_for(folder)) as engine:
            found.append(engine.evaluate(batch).loss())
    assert found[0] == found[1]
