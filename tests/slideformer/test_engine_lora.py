"""LoRA: adapters train as in a plain PyTorch loop, and are saved as PEFT does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from slideformer.checkpointing import Checkpoint
from slideformer.engine import Engine
from slideformer.graph.errors import CheckpointError, ConfigError
from slideformer.graph.tasks import TaskKind
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
    weights_of,
    write_model,
)

LR = 2e-3
BATCHES = [make_batch(seed) for seed in range(6)]
ALL: dict[str, Any] = {"rank": 4, "alpha": 12}
SOME: dict[str, Any] = {"rank": 3, "alpha": 3, "target_modules": ["v_proj", "q_proj", "up_proj"]}


class Adapted(nn.Module):
    """A linear layer with an adapter, by the book."""

    def __init__(self, base: nn.Linear, a: Tensor, b: Tensor, scale: float) -> None:
        super().__init__()
        self.base = base.requires_grad_(requires_grad=False)
        self.lora_A, self.lora_B = nn.Parameter(a.clone()), nn.Parameter(b.clone())
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.scale * (x @ self.lora_A.T @ self.lora_B.T)
        return out


def adapted_model(folder: Path, adapters: Weights, scale: float) -> tuple[Any, Weights]:
    """The transformers model with these adapters in it, and its parameters of them by our names."""
    model = load_model(folder)
    model.requires_grad_(requires_grad=False)
    parameters: Weights = {}
    for key, a in adapters.items():
        if ".lora_A." not in key:
            continue
        stem = key.removesuffix(".lora_A.weight")
        parent, _, name = stem.rpartition(".")
        module = Adapted(model.get_submodule(stem), a, adapters[f"{stem}.lora_B.weight"], scale)
        setattr(model.get_submodule(parent), name, module)
        parameters[key] = module.lora_A
        parameters[f"{stem}.lora_B.weight"] = module.lora_B
    return model, parameters


def train_reference(
    folder: Path, adapters: Weights, scale: float, decay: float
) -> tuple[list[float], list[float], Weights]:
    """Losses, norms and adapters of a plain loop in FP32."""
    model, parameters = adapted_model(folder, adapters, scale)
    optimizer = torch.optim.AdamW(parameters.values(), lr=LR, weight_decay=decay)
    losses, norms = [], []
    for batch in BATCHES:
        optimizer.zero_grad()
        losses.append(sum(backward(model, batch, s) for s in range(0, ROWS, MICRO_ROWS)))
        gradients = [p.grad for p in parameters.values() if p.grad is not None]
        norms.append(float(torch.nn.utils.get_total_norm(gradients)))
        optimizer.step()
    return losses, norms, {name: p.detach() for name, p in parameters.items()}


def adapters_in(weights: Weights) -> Weights:
    """Those of the adapters."""
    return {name: value for name, value in weights.items() if ".lora_" in name}


def start_of(config: Any) -> Weights:
    """All weights before training; both matrices of adapters drawn, so that all have gradients."""
    with engine_with(config) as engine:
        return weights_of(engine)


@pytest.fixture
def drawn_b(monkeypatch: pytest.MonkeyPatch) -> None:
    """B begins at zero, which hides A's gradient in the first step; begin elsewhere."""
    from slideformer import filling
    from slideformer.kernels.split import split_master
    from slideformer.models.adapter_files import init_adapters

    def drawn(spec: Any, masters: Any, seed: int) -> None:
        init_adapters(spec, masters, seed)
        generator = torch.Generator().manual_seed(1)
        for unit in spec.adapters.values():
            hi, lo = masters[unit.name]
            for param in unit.params:
                if ".lora_B." in param.key:
                    where = slice(param.offset, param.offset + param.numel)
                    values = 0.05 * torch.randn(param.numel, generator=generator)
                    split_master(values, hi[where], lo[where])

    monkeypatch.setattr(filling, "init_adapters", drawn)


@pytest.mark.usefixtures("drawn_b")
@pytest.mark.parametrize(
    ("variant", "lora", "settings", "plan"),
    [
        ("llama-biases", ALL, {}, {}),
        ("qwen3", SOME, {"tied": True}, {"vocab_chunks": 3, "offloaded": 2, "window": 3}),
        ("phi3", ALL, {}, {"kept": 2, "offloaded": 1}),
        ("gemma2", ALL, {"tied": True}, {"chunk_numel": 300}),
        ("mixtral", ALL, {}, {"kept": 1, "offloaded": 2}),  # of whose experts there are none
        ("mixtral", ALL, {"num_local_experts": 2}, {}),  # a token passes through both
    ],
)
def test_adapters_train_as_in_plain_pytorch(
    variant: str,
    lora: dict[str, Any],
    settings: dict[str, Any],
    plan: dict[str, Any],
    tmp_path: Path,
) -> None:
    folder = write_model(tmp_path / "model", variant, **settings)
    config = config_for(folder, lr=LR, weight_decay=0.1, lora=lora)
    start = start_of(config)
    scale = lora["alpha"] / lora["rank"]
    losses, norms, adapters = train_reference(folder, adapters_in(start), scale, 0.1)
    with engine_with(config, **plan) as engine:
        handles = [engine.step(batch) for batch in BATCHES]
        assert [h.loss() for h in handles] == pytest.approx(losses, rel=1e-5)
        assert [h.gradient_norm() for h in handles] == pytest.approx(norms, rel=1e-5)
        weights = weights_of(engine)
    assert too_far(adapters_in(weights), adapters) == []
    assert len(too_far(adapters_in(start), adapters)) == len(adapters), "all have moved"
    assert set(different(weights, start)) == adapters.keys()
    stored = stored_weights(folder)
    assert different({name: weights[name] for name in stored}, stored) == []


def test_where_things_lie_changes_no_bit(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "qwen2")
    config = config_for(folder, compute="bf16", lora=ALL)
    adapters = frozenset({"A00", "A01", "A02"})
    plans: list[dict[str, Any]] = [
        {},
        {"resident": adapters, "window": 3, "offloaded": 2},
        {"resident": adapters | {"embed", "L01"}, "kept": 1, "spilled": 1, "deferred": True},
        {"resident": frozenset({"A01"}), "chunk_numel": 300, "offloaded": 3},
    ]
    check_same_bits(*(train(config, BATCHES[:3], **plan) for plan in plans))


def test_the_planner_keeps_adapters_on_the_gpu_and_two_bytes_of_the_rest(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", hidden_size=256, intermediate_size=512)
    with Engine(config_for(folder, compute="bf16", lora=ALL, gpu_memory="1GiB")) as engine:
        plan, spec = engine.plan, engine.spec
        assert {"A00", "A01", "A02"} <= plan.resident
        kinds = {task.kind for task in engine.graph.tasks}
        assert TaskKind.CPU_UPDATE not in kinds
        assert not [n for n in engine.graph.buffers if n.startswith(("gh.", "g.", "parked."))]
        for unit in spec.own_units:
            state = engine._memory.states[unit.name]
            assert (len(state.hi), len(state.lo), len(state.m)) == (unit.numel, 0, 0)
        before = engine.evaluate(BATCHES[0]).loss()
        for _ in range(5):
            engine.step(BATCHES[0], lr=1e-2)
        assert engine.evaluate(BATCHES[0]).loss() < before


def test_the_saved_folder_holds_adapters_as_peft_does(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    config = config_for(folder, compute="bf16", lr=LR, lora=SOME)
    # What is resident and not saved is larger than the adapters, so than the place of a save.
    with engine_with(config, resident=frozenset({"A00", "A02", "embed", "L01"})) as engine:
        for batch in BATCHES:
            engine.step(batch)
        output = engine.save(tmp_path / "out", lambda: {"notes.txt": "text"})
        trained = adapters_in(weights_of(engine))
    assert sorted(path.name for path in output.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "generation_config.json",
        "notes.txt",
    ]
    stored = load_file(output / "adapter_model.safetensors")
    assert different({f"base_model.model.{k}": v for k, v in trained.items()}, stored) == []
    described = json.loads((output / "adapter_config.json").read_text())
    assert described["peft_type"] == "LORA"
    assert (described["r"], described["lora_alpha"]) == (3, 3)
    assert described["target_modules"] == ["q_proj", "up_proj", "v_proj"]
    assert Path(described["base_model_name_or_path"]) == folder


def test_a_resumed_run_has_the_same_bits_and_exports_its_adapters(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    config = config_for(folder, compute="bf16", lr=LR, lora=ALL)
    adapters = frozenset({"A00", "A01", "A02"})
    with engine_with(config, resident=adapters) as engine:
        engine.step(BATCHES[0])
        path = engine.checkpoint(tmp_path / "step-1").finish()
        saved = engine.save(tmp_path / "saved")
        engine.step(BATCHES[1])
        plain = state_of(engine)
    checkpoint = Checkpoint(path)
    assert {p.name for p in (path / "units").iterdir()} == adapters
    for resident in (adapters, frozenset({"A01", "embed"})):
        with engine_with(config, checkpoint=checkpoint, resident=resident) as engine:
            engine.step(BATCHES[1])
            assert different(state_of(engine), plain) == []
    exported = checkpoint.export(tmp_path / "exported")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (exported / name).read_bytes() == (saved / name).read_bytes()
    other = config.model_copy(update={"lora": None})
    with (
        pytest.raises(CheckpointError, match=r"its adapters is rank 4, alpha 12, .* is none"),
        engine_with(other, checkpoint=checkpoint),
    ):
        pass
    weights = load_file(folder / "model.safetensors")
    key = "model.layers.1.mlp.up_proj.weight"
    save_file({**weights, key: weights[key] + 1}, folder / "model.safetensors", {"format": "pt"})
    with (
        pytest.raises(CheckpointError, match=rf"step-1: .* other weights than {folder} holds now"),
        engine_with(config, checkpoint=checkpoint),
    ):
        pass


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"alpha": 8}, "lora: rank is not set; the names are rank, alpha, target_modules"),
        ({"rank": 0, "alpha": 8}, "lora: rank is 0: it should be greater than or equal to 1"),
        ({"rank": 8, "alpha": 8, "dropout": 0.1}, "lora: unknown name 'dropout'; the names are"),
        ({**ALL, "target_modules": "q_proj"}, "target_modules is 'q_proj': it should be a list"),
        (8, "lora: 8 is not 'name: value' pairs"),
        ({**ALL, "target_modules": ["qproj"]}, "target_modules has 'qproj', but the layers of"),
    ],
)
def test_wrong_adapters_are_refused_in_one_line(lora: Any, words: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    with pytest.raises(ConfigError) as caught, engine_with(config_for(folder, lora=lora)):
        pass
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_groups_reach_adapters_alone(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    groups = [{"pattern": "*.lora_B.*", "lr_scale": 16}]
    with engine_with(config_for(folder, lora=ALL, parameter_groups=groups)) as engine:
        scales = {p.key: p.lr_scale for u in engine.spec.units for p in u.params}
    assert {key for key, scale in scales.items() if scale == 16} == {
        key for key in scales if ".lora_B." in key
    }
    for group, words in (
        ({"pattern": "*.q_proj.weight"}, "matches no parameter"),
        ({"pattern": "*lora_A*", "frozen": True}, "group 1 is frozen, but with lora all but the"),
    ):
        config = config_for(folder, lora=ALL, parameter_groups=[group])
        with pytest.raises(ConfigError, match=words), engine_with(config):
            pass


def test_masters_of_adapters_are_read_by_name(tmp_path: Path) -> None:
    """What the tests above compare is not empty."""
    folder = write_model(tmp_path / "model")
    with engine_with(config_for(folder, lora=SOME)) as engine:
        states = {u.name: engine._memory.whole(u.name) for u in engine.spec.units}
        masters = {name: (state.hi, state.lo) for name, state in states.items()}
        names = [key for key, _ in joined(engine.spec, masters) if ".lora_" in key]
    assert len(names) == 3 * 3 * 2
