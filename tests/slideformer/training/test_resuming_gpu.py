"""On a real GPU, too, a stopped run that is resumed ends in the files of one that never was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from slideformer.trainer import Trainer
from tests.slideformer.training.test_resuming import Stopper, run_config, same
from tests.support.checkpoints import write_checkpoint, write_text

pytestmark = pytest.mark.gpu

WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped, accumulated": {"max_grad_norm": 0.5, "accumulate": 2},
    "packed, validated": {"packing": True, "validation_split": 0.2, "evaluate_every": 3},
    "8-bit moments": {"optimizer": "adamw8bit"},
    "LoRA": {"lora": {"rank": 8, "alpha": 16}},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_stopped_run_ends_as_one_that_was_not(way: str, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", hidden_size=64, head_dim=16)
    data = write_text(tmp_path / "text.txt")
    settings = {"device": "cuda", "deterministic": True, **WAYS[way]}
    try:
        plain = run_config(model, data, tmp_path / "plain", checkpoint_every=None, **settings)
        assert not Trainer(plain).train().interrupted
        stopped = run_config(model, data, tmp_path / "stopped", **settings)
        assert Trainer(stopped).train(Stopper(after=5)).interrupted
        other = {"policy": "fifo", "threads": 2, "cpu_memory": 8 << 30}
        Trainer.resume(stopped.output, other).train()
    finally:
        torch.use_deterministic_algorithms(False)
    same(stopped.output, plain.output)
