"""Adapters merged into their model: the sum, in the model's dtype; refusals name the file."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from slideformer.graph.errors import CheckpointError
from slideformer.merging import merge_adapters
from tests.models.tiny import save, tiny_config, tiny_model
from tests.support.engines import (
    config_for,
    engine_with,
    make_batch,
    reference_loss,
    write_model,
)

RANK, ALPHA = 2, 6.0
PREFIX = "base_model.model."


def write_adapter(folder: Path, base: Path, **changes: Any) -> dict[str, Tensor]:
    """Adapters on two modules of every layer, as PEFT writes them; returns what they add."""
    weights = load_file(base / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    stored: dict[str, Tensor] = {}
    added: dict[str, Tensor] = {}
    for key, weight in weights.items():
        if key.endswith(("v_proj.weight", "down_proj.weight")):
            stem = key.removesuffix(".weight")
            a = torch.randn(RANK, weight.shape[1], generator=generator)
            b = torch.randn(weight.shape[0], RANK, generator=generator)
            stored[f"{PREFIX}{stem}.lora_A.weight"] = a
            stored[f"{PREFIX}{stem}.lora_B.weight"] = b
            added[key] = ALPHA / RANK * (b @ a)
    folder.mkdir()
    save_file(stored, folder / "adapter_model.safetensors")
    described = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(base),
        "r": RANK,
        "lora_alpha": ALPHA,
        **changes,
    }
    (folder / "adapter_config.json").write_text(json.dumps(described))
    return added


def model(folder: Path, dtype: torch.dtype, **settings: Any) -> Path:
    return save(tiny_model(tiny_config("llama-biases", **settings)), folder, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_the_merged_model_has_the_sums(dtype: torch.dtype, tied: bool, tmp_path: Path) -> None:
    base = model(tmp_path / "base", dtype, tied=tied)
    added = write_adapter(tmp_path / "adapter", base)
    merged = merge_adapters(tmp_path / "adapter", tmp_path / "merged")
    before = load_file(base / "model.safetensors")
    after: dict[str, Tensor] = {}
    for path in merged.glob("*.safetensors"):
        after |= load_file(path)
    assert after.keys() == before.keys()
    assert len(added) == 6
    for key, value in before.items():
        assert after[key].dtype is dtype
        if key not in added:
            assert torch.equal(after[key], value)
            continue
        expected = value.float() + added[key]
        half = 0.0 if dtype is torch.float32 else 2.0**-8
        torch.testing.assert_close(after[key].float(), expected, rtol=1e-6 + half, atol=1e-6)
        assert not torch.equal(after[key], value)
    assert json.loads((merged / "config.json").read_text())["model_type"] == "llama"


@pytest.mark.parametrize("variant", ["llama-biases", "phi3"])
def test_peft_opens_what_we_save_and_we_merge_what_peft_saves(variant: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    folder = write_model(tmp_path / "model", variant)
    batch = make_batch(9)
    lora = {"rank": 4, "alpha": 12}
    with engine_with(config_for(folder, lora=lora, lr=1e-2)) as engine:
        for seed in range(3):
            engine.step(make_batch(seed))
        ours = engine.evaluate(batch).loss()
        saved = engine.save(tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it uses names that transformers gives up
        model = peft.AutoPeftModelForCausalLM.from_pretrained(saved)
        model.save_pretrained(tmp_path / "again")
    logits = model(input_ids=batch.input_ids).logits
    theirs = torch.nn.functional.cross_entropy(
        logits.view(-1, logits.shape[-1]).float(), batch.targets.view(-1), ignore_index=-100
    )
    assert float(theirs) == pytest.approx(ours, rel=1e-5)
    assert reference_loss(folder, batch) != pytest.approx(ours, rel=1e-5)
    for number, adapter in enumerate((saved, tmp_path / "again")):
        merged = merge_adapters(adapter, tmp_path / f"merged{number}")
        assert reference_loss(merged, batch) == pytest.approx(ours, rel=1e-5)


def refused(adapter: Path, output: Path, base: Path | None = None) -> str:
    """The message of a refusal, after which there is no output."""
    with pytest.raises(CheckpointError) as caught:
        merge_adapters(adapter, output, base)
    assert not output.exists()
    return str(caught.value)


def test_adapters_of_another_model_or_kind_are_refused(tmp_path: Path) -> None:
    base = model(tmp_path / "base", torch.float32)
    other = model(tmp_path / "other", torch.float32, hidden_size=32)
    write_adapter(tmp_path / "adapter", base)
    output = tmp_path / "merged"
    message = refused(tmp_path / "adapter", output, other)
    assert "is no adapter of this model; name the model it belongs to" in message
    write_adapter(tmp_path / "dora", base, use_dora=True)
    assert "use_dora is True; only plain LoRA" in refused(tmp_path / "dora", output)
    write_adapter(tmp_path / "away", tmp_path / "base", base_model_name_or_path="some/model")
    assert "some/model, which is no folder here; name its folder with --model" in refused(
        tmp_path / "away", output
    )
    assert merge_adapters(tmp_path / "away", output, base) == output
    assert "cannot be read: No such file" in refused(tmp_path / "none", tmp_path / "out")
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    assert "adapter_config.json is damaged (KeyError" in refused(
        tmp_path / "adapter", tmp_path / "out"
    )
    (tmp_path / "adapter" / "adapter_config.json").write_text("[" * 100_000)
    assert "adapter_config.json is damaged" in refused(tmp_path / "adapter", tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 0}, "r is 0 and lora_alpha is 6.0; a rank of at least 1"),
        ({"r": RANK + 1}, rf"has the shape \({RANK}, \d+\), but r is {RANK + 1} in adapter_config"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan; .* a finite number"),
        ({"lora_alpha": 1e38}, "with its adapters .* is not finite"),
        ({"base_model_name_or_path": None}, "belongs to the model None, which is no folder here"),
        ({"base_model_name_or_path": 5}, "belongs to the model 5, which is no folder here"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is .* only plain LoRA"),
    ],
)
def test_what_cannot_be_added_is_refused_and_leaves_nothing(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    base = model(tmp_path / "base", torch.float32)
    write_adapter(tmp_path / "adapter", base, **changes)
    with pytest.raises(CheckpointError, match=message):
        merge_adapters(tmp_path / "adapter", tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_file_without_adapters_is_refused(tmp_path: Path) -> None:
    base = model(tmp_path / "base", torch.float32)
    write_adapter(tmp_path / "adapter", base)
    save_file({}, tmp_path / "adapter" / "adapter_model.safetensors")
    assert "holds no adapters" in refused(tmp_path / "adapter", tmp_path / "merged")
