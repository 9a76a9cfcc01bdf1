"""The baselines R1–R4: everything on the GPU, in plain transformers, in a process of their own.

| name | weights and states | recompute | optimizer |
|---|---|---|---|
| R1 | BF16 | every layer | fused AdamW |
| R2 | FP32 masters and moments beside a BF16 model | every layer | fused AdamW |
| R3 | as R2 | none | fused AdamW |
| R4 | BF16 | every layer | none: forward and backward only |

All of Liger's kernels for the family are applied where Liger is installed; attention is SDPA and
the whole batch is one micro-batch. Nothing of SlideFormer's own arithmetic runs here.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from slideformer.graph.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a baseline trains."""

    masters: bool
    recompute: bool
    optimizer: bool


RECIPES = {
    "R1": Recipe(masters=False, recompute=True, optimizer=True),
    "R2": Recipe(masters=True, recompute=True, optimizer=True),
    "R3": Recipe(masters=True, recompute=False, optimizer=True),
    "R4": Recipe(masters=False, recompute=True, optimizer=False),
}


class MasterAdamW:
    """Fused AdamW on FP32 copies of BF16 parameters."""

    def __init__(self, parameters: list[torch.nn.Parameter], **settings: Any) -> None:
        self._parameters = parameters
        self._masters = [p.detach().float() for p in parameters]
        self._optimizer = torch.optim.AdamW(self._masters, fused=True, **settings)

    def step(self) -> None:
        """Update the masters with the parameters' gradients, which are given up, and round."""
        for parameter, master in zip(self._parameters, self._masters, strict=True):
            assert parameter.grad is not None
            master.grad = parameter.grad.float()
            parameter.grad = None
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_copy_(self._parameters, self._masters)


class Baseline:
    """One baseline on one shape and batch; answers the requests of a benchmark."""

    def __init__(self) -> None:
        self._model: Any = None
        self._optimizer: Any = None
        self._batches: list[Tensor] = []

    def hello(self, device: str) -> dict[str, Any]:
        """Versions, and which device it runs on; makes the context on the device."""
        self._device = torch.device(device)
        _memory_reset(self._device)
        return {"liger": _version("liger-kernel"), **memory(self._device)}

    def prepare(
        self,
        recipe: str,
        model: dict[str, Any] | str,
        batch_size: int = 0,
        seq_len: int = 0,
        lr: float = 1e-5,
        tokens: str | None = None,
    ) -> None:
        """Say what to run: a config as a dictionary (random weights) or a checkpoint folder.

        ``tokens`` is a .npy file int64 [steps, B, S]; otherwise batches are random.
        """
        if recipe not in RECIPES:
            raise ConfigError(f"unknown baseline {recipe!r}: known are {', '.join(RECIPES)}")
        self._recipe = RECIPES[recipe]
        self._lr = lr
        if isinstance(model, str):
            self._folder: str | None = model
            self._config = AutoConfig.from_pretrained(model)
        else:
            self._folder = None
            settings = dict(model)
            self._config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        if tokens is None:
            generator = torch.Generator().manual_seed(0)
            shape = (batch_size, seq_len)
            ids = [
                torch.randint(0, self._config.vocab_size, shape, generator=generator)
                for _ in range(4)
            ]
        else:
            ids = list(torch.from_numpy(np.load(tokens)))
        self._host_ids = ids

    def run(self, steps: int, warmup: int) -> dict[str, Any]:
        """Seconds per step over ``steps`` steps after ``warmup`` steps, and the memory they took."""
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
        self._batches = []
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def save_model(self, config: dict[str, Any], folder: str, seed: int) -> None:
        """Write a checkpoint in BF16 with random weights, for both sides to start from."""
        settings = dict(config)
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(settings.pop("model_type"), **settings), dtype=torch.float32
        )
        model.to(torch.bfloat16).save_pretrained(Path(folder))

    def _build(self) -> None:
        _apply_liger(self._config.model_type)
        torch.manual_seed(0)
        settings = {"dtype": torch.bfloat16, "attn_implementation": "sdpa"}
        with self._device:
            if self._folder is None:
                model = AutoModelForCausalLM.from_config(self._config, **settings)
            else:
                model = AutoModelForCausalLM.from_pretrained(self._folder, **settings)
        model.to(self._device).train()
        model.config.use_cache = False
        if self._recipe.recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self._model = model
        self._parameters = list(model.parameters())
        settings = {"lr": self._lr, "weight_decay": 0.0}
        if self._recipe.masters:
            self._optimizer = MasterAdamW(self._parameters, **settings)
        elif self._recipe.optimizer:
            self._optimizer = torch.optim.AdamW(self._parameters, fused=True, **settings)
        self._batches = [ids.to(self._device) for ids in self._host_ids]

    def _step(self, step: int) -> Tensor:
        ids = self._batches[step % len(self._batches)]
        loss: Tensor = self._model(input_ids=ids, labels=ids).loss
        loss.backward()
        if self._optimizer is not None:
            self._optimizer.step()
        for parameter in self._parameters:
            parameter.grad = None
        return loss.detach()

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()


def memory(device: torch.device) -> dict[str, int]:
    """Bytes of GPU memory: peaks of this process, and what all processes together use now.

    Empty where there is no GPU.
    """
    if device.type != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info(device)
    return {
        "allocated_peak": torch.cuda.max_memory_allocated(device),
        "reserved_peak": torch.cuda.max_memory_reserved(device),
        "reserved": torch.cuda.memory_reserved(device),
        "used": total - free,
        "total": total,
        "retries": torch.cuda.memory_stats(device).get("num_alloc_retries", 0),
    }


def _memory_reset(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.init()
        torch.zeros(1, device=device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _apply_liger(model_type: str) -> None:
    """Let Liger patch the family's modules; without Liger the model stays as it is."""
    if _version("liger-kernel") is None or not torch.cuda.is_available():
        return
    module = importlib.import_module("liger_kernel.transformers")
    getattr(module, f"apply_liger_kernel_to_{model_type}")()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
