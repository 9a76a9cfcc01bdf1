"""Accumulation: a step of several batches equals a plain PyTorch loop, in FP32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from slideformer.engine import Engine
from slideformer.graph.errors import BudgetError, ConfigError
from slideformer.graph.tasks import TaskKind
from tests.support.engines import (
    MICRO_ROWS,
    ROWS,
    check_equal,
    check_moved,
    config_for,
    engine_with,
    make_batch,
    stored_weights,
    train,
    train_reference,
    write_model,
)

LR = 5e-4
STEPS = 20
MAX_NORM = 0.3

CASES: list[tuple[int, str, dict[str, Any], float | None]] = [
    (1, "llama-biases", {"tied": True}, MAX_NORM),
    (2, "qwen2", {}, None),
    (2, "qwen3-biases", {"tied": True}, MAX_NORM),
    (8, "mistral", {"num_hidden_layers": 1}, MAX_NORM),
    (2, "phi3-partial", {}, MAX_NORM),
    (2, "gemma2", {"tied": True}, MAX_NORM),
    (2, "gemma3_text-biases", {}, MAX_NORM),
    (2, "mixtral", {"tied": True}, MAX_NORM),
    (2, "qwen3_moe-normalised", {}, MAX_NORM),
]


def rates(step: int) -> float:
    """Learning rates that rise and fall."""
    return LR * min((step + 1) / 5, 1.0, (STEPS - step) / 10)


@pytest.mark.parametrize(("accumulate", "variant", "settings", "max_norm"), CASES)
def test_twenty_steps_equal_plain_pytorch(
    accumulate: int, variant: str, settings: dict[str, Any], max_norm: float | None, tmp_path: Path
) -> None:
    """Batches have unlike numbers of targets, and the loss is the mean of all of a step's."""
    folder = write_model(tmp_path / "model", variant, **settings)
    rows = ROWS * accumulate
    lengths = [[16, 5 + seed % 3, 16, 9] * accumulate for seed in range(STEPS)]
    batches = [make_batch(seed, lengths=lengths[seed], rows=rows) for seed in range(STEPS)]
    reference = train_reference(folder, batches, lr=rates, max_norm=max_norm, weight_decay=0.1)
    check_moved(reference, stored_weights(folder))
    config = config_for(
        folder, accumulate=accumulate, max_grad_norm=max_norm, weight_decay=0.1, lr=LR
    )
    check_equal(train(config, batches, lr=rates), reference)


def test_weights_cross_pcie_as_often_as_for_one_batch(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    loads = []
    for accumulate in (1, 4):
        with engine_with(config_for(folder, accumulate=accumulate, window=2)) as engine:
            assert engine.plan.micro_batches == accumulate * ROWS // MICRO_ROWS
            tasks = engine.graph.tasks
            loads.append(
                [
                    task.name
                    for task in tasks
                    if task.kind is TaskKind.H2D and task.reads[0].startswith("hi.")
                ]
            )
    assert loads[0] == loads[1] != []


def test_what_does_not_fit_is_refused_with_what_would(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    config = config_for(folder, accumulate=2, gpu_memory="1MiB", micro_batch=1)
    with pytest.raises(BudgetError, match=r"8 rows of 16 tokens.* smaller .*--accumulate"):
        Engine(config)
    with pytest.raises(ConfigError, match="accumulate is 0"):
        config_for(folder, accumulate=0)
