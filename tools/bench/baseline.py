"""The baselines R1–R4: everything on the GPU, in plain transformers, in a process of their own.

| name | weights and states | recompute | optimizer |
|---|---|---|---|
| R1 | BF16 | every layer | fused AdamW |
| R2 | FP32 masters and moments beside a BF16 model | every layer | fused AdamW |
| R3 | as R2 | none | fused AdamW |
| R4 | BF16 | every layer | none: forward and backward only |
| LoRA | BF16, frozen, with BF16 adapters and FP32 masters of them | every layer | fused AdamW |
| layer | one layer in BF16 stands for all | every layer | none: neither embedding nor head either |

All of Liger's kernels for the family are applied where Liger is installed; attention is SDPA and
the whole batch is one micro-batch, but for ``layer``, whose micro-batches are the engine's. Nothing
of SlideFormer's own arithmetic runs here.
"""

from __future__ import annotations

import gc
import importlib
import importlib.metadata
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from slideformer.measuring.trial import memory, random_batches, shape_config, torch_device


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a baseline trains."""

    masters: bool
    recompute: bool
    optimizer: bool
    one_layer: bool = False
    adapters: bool = False


RECIPES = {
    "R1": Recipe(masters=False, recompute=True, optimizer=True),
    "R2": Recipe(masters=True, recompute=True, optimizer=True),
    "R3": Recipe(masters=True, recompute=False, optimizer=True),
    "R4": Recipe(masters=False, recompute=True, optimizer=False),
    "LoRA": Recipe(masters=True, recompute=True, optimizer=True, adapters=True),
    "layer": Recipe(masters=False, recompute=True, optimizer=False, one_layer=True),
}


class MasterAdamW:
    """Fused AdamW on FP32 copies of BF16 parameters."""

    def __init__(self, parameters: Sequence[Tensor], lr: float) -> None:
        self._parameters = parameters
        self._masters = [p.detach().float() for p in parameters]
        self._optimizer = torch.optim.AdamW(self._masters, lr=lr, weight_decay=0.0, fused=True)

    def step(self) -> None:
        """Update the masters with the parameters' gradients, which are given up, and round."""
        for parameter, master in zip(self._parameters, self._masters, strict=True):
            assert parameter.grad is not None
            master.grad = parameter.grad.float()
            parameter.grad = None
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_copy_(list(self._parameters), self._masters)


class _Adapted(torch.nn.Module):
    """A linear layer with a low-rank adapter, in its dtype."""

    def __init__(self, base: torch.nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.base, self._scale = base, scale
        a = torch.empty_like(base.weight[:rank]).uniform_(-1, 1).mul_(base.in_features**-0.5)
        self.a = torch.nn.Parameter(a)
        self.b = torch.nn.Parameter(base.weight.new_zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + (x @ self.a.T @ self.b.T) * self._scale
        return out


def _adapt(model: Any, rank: int = 16, alpha: float = 32.0, target_modules: Any = ()) -> None:
    """Give the layers' projections adapters: those that are named, or all."""
    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, module in list(block.named_children()):
                if isinstance(module, torch.nn.Linear) and name in (target_modules or (name,)):
                    setattr(block, name, _Adapted(module, rank, alpha / rank))


class Baseline:
    """One baseline on one shape and batch; answers the requests of a benchmark."""

    def __init__(self) -> None:
        self._model: Any = None
        self._optimizer: Any = None
        self._parameters: list[Tensor] = []
        self._batches: list[Tensor] = []
        self._folder: str | None = None
        self._lr = 1e-5

    def hello(self, device: str) -> dict[str, Any]:
        """Make the context on the device; returns the version of Liger, None if it is not used."""
        self._device = torch_device(device)
        self._liger = _version("liger-kernel") if self._device.type == "cuda" else None
        return {"liger": self._liger, **memory(self._device)}

    def prepare(
        self,
        recipe: str,
        shape: str,
        batch_size: int,
        seq_len: int,
        micro_rows: int,
        lora: dict[str, Any] | None = None,
    ) -> None:
        """Say what to run: a recipe on a shape with random weights and random batches.

        ``micro_rows`` are the rows that ``layer`` computes at once, ``lora`` the engine's setting.
        """
        self._lora = lora
        self._recipe = RECIPES[recipe]
        self._folder = None
        self._config = shape_config(shape)
        batches = random_batches(self._config.vocab_size, batch_size, seq_len, 4)
        self._host_ids = [batch.input_ids for batch in batches]
        self._micro_rows, self._layers = micro_rows, self._config.num_hidden_layers
        if self._recipe.one_layer:
            self._config.num_hidden_layers = 1

    def prepare_folder(self, recipe: str, folder: str, tokens: str, lr: float) -> None:
        """Say what to run: a recipe on a checkpoint; batches are those of a .npy file [n, B, S]."""
        self._recipe = RECIPES[recipe]
        self._lr = lr
        self._folder = folder
        self._config = AutoConfig.from_pretrained(folder)
        self._host_ids = list(torch.from_numpy(np.load(tokens)))

    def run(self, steps: int, warmup: int) -> dict[str, Any]:
        """Seconds per step over ``steps`` steps after ``warmup`` others, and the memory taken."""
        if self._model is None:
            self._build()
        for step in range(warmup):
            self._step(step)
        self._synchronize()
        started = time.perf_counter()
        for step in range(steps):
            self._step(step)
        self._synchronize()
        seconds = (time.perf_counter() - started) / max(steps, 1)
        return {"step_seconds": seconds, **memory(self._device)}

    def losses(self) -> list[float]:
        """Train once on each of the batches; the loss of each."""
        if self._model is None:
            self._build()
        return [float(self._step(step)) for step in range(len(self._batches))]

    def release(self) -> None:
        """Give all GPU memory but the context back; `run` then starts with new weights."""
        self._model = self._optimizer = None
        self._parameters, self._batches = [], []
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def save_model(self, config: dict[str, Any], folder: str, seed: int) -> None:
        """Write a checkpoint in BF16 with random weights, for both sides to start from."""
        settings = dict(config)
        torch.manual_seed(seed)
        model = _auto_model().from_config(
            AutoConfig.for_model(settings.pop("model_type"), **settings), dtype=torch.float32
        )
        model.to(torch.bfloat16).save_pretrained(Path(folder))

    def _build(self) -> None:
        if self._liger is not None:
            _apply_liger(self._config.model_type)
        torch.manual_seed(0)
        settings = {"dtype": torch.bfloat16, "attn_implementation": "sdpa"}
        if self._folder is None:
            with self._device:
                model = _auto_model().from_config(self._config, **settings)
        else:
            model = _auto_model().from_pretrained(self._folder, **settings)
        model.to(self._device).train()
        model.config.use_cache = False
        if self._recipe.recompute:
            # The second name is that of transformers before it was renamed.
            enable = getattr(model, "activation_checkpointing_enable", None)
            (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
        self._model = model
        if self._recipe.adapters:
            model.requires_grad_(requires_grad=False)
            _adapt(model, **(self._lora or {}))
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        if self._recipe.masters:
            self._optimizer = MasterAdamW(self._parameters, self._lr)
        elif self._recipe.optimizer:
            self._optimizer = torch.optim.AdamW(
                self._parameters, lr=self._lr, weight_decay=0.0, fused=True
            )
        self._batches = [ids.to(self._device) for ids in self._host_ids]

    def _step(self, step: int) -> Tensor:
        ids = self._batches[step % len(self._batches)]
        if self._recipe.one_layer:
            return self._layer_steps(ids)
        loss: Tensor = self._model(input_ids=ids, labels=ids).loss
        loss.backward()
        if self._optimizer is not None:
            self._optimizer.step()
        for parameter in self._parameters:
            parameter.grad = None
        return loss.detach()

    def _layer_steps(self, ids: Tensor) -> Tensor:
        """Forward, recompute and backward of one layer, as often as there are layers."""
        decoder = self._model.model
        layer, rows = decoder.layers[0], self._micro_rows
        x = torch.randn(
            rows, ids.shape[1], self._config.hidden_size, dtype=torch.bfloat16, device=self._device
        ).requires_grad_()
        positions = torch.arange(ids.shape[1], device=self._device).unsqueeze(0)
        tables = decoder.rotary_emb(x, positions)
        loss = torch.zeros((), device=self._device)
        for _ in range(self._layers):
            for parameter in layer.parameters():
                parameter.grad = None
            for _ in range(len(ids) // rows):
                x.grad = None
                y = layer(
                    x, attention_mask=None, position_ids=positions, position_embeddings=tables
                )
                y.backward(x.detach())
        return loss

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()


def _apply_liger(model_type: str) -> None:
    """Let Liger patch all it can of the family's modules."""
    module = importlib.import_module("liger_kernel.transformers")
    getattr(module, f"apply_liger_kernel_to_{model_type}")()


def _auto_model() -> Any:
    """The factory of causal models, which transformers does not type."""
    return AutoModelForCausalLM


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
