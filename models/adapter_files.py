"""Adapters of a model: their first values, and the files in which PEFT keeps them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from slideformer.graph.model import Lora, ModelSpec, UnitSpec
from slideformer.kernels.split import split_master
from slideformer.models.export import HuggingFaceWriter
from slideformer.models.safetensors_file import write_file
from slideformer.models.units import MasterWeights
from slideformer.models.weights import named_generator

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

PREFIX = "base_model.model."
"""What PEFT puts before the names of parameters."""


def init_adapters(spec: ModelSpec, weights: MasterWeights, seed: int) -> None:
    """Fill the masters of all adapters as PEFT does: A uniform within ±1/√inputs, B zero.

    A parameter's values depend on ``seed`` and its name alone; padding is zeroed.
    """
    for unit in spec.adapters.values():
        hi, lo = weights[unit.name]
        values = torch.zeros(unit.numel)
        for param in unit.params:
            if ".lora_A." in param.key:
                generator = named_generator(seed, param.key)
                drawn = generator.random(param.numel, dtype=np.float32) * 2 - 1
                part = values[param.offset : param.offset + param.numel]
                part.copy_(torch.from_numpy(drawn / np.float32(math.sqrt(param.shape[1]))))
        split_master(values.to(hi.device), hi, lo)


class AdapterWriter(HuggingFaceWriter):
    """Writes the adapters of a model, in FP32, as a folder that PEFT opens.

    ``base`` is the model folder that they belong to; other arguments as for its base class.
    """

    def __init__(
        self,
        source: Path,
        output: Path,
        spec: ModelSpec,
        weights: MasterWeights,
        *,
        replace: bool,
        base: Path,
        files: Mapping[str, bytes] | None,
    ) -> None:
        super().__init__(source, output, spec, weights, torch.float32, replace=replace, files=files)
        self._base = base

    def _write_shard(self, unit: UnitSpec) -> None:
        with (self._aside / unit.name).open("xb") as file:
            for piece in self._pieces(unit):
                file.write(piece.numpy().data)

    def _write_index(self) -> None:
        """Put all adapters into the one file that PEFT looks for."""
        units = self._spec.saved_units
        write_file(
            self._aside / ADAPTER_WEIGHTS,
            self._dtype,
            [(PREFIX + param.key, param.shape) for unit in units for param in unit.params],
            (torch.from_numpy(np.fromfile(self._aside / u.name, np.float32)) for u in units),
        )
        for unit in units:
            (self._aside / unit.name).unlink()

    def _write_config(self) -> None:
        assert self._spec.lora is not None
        config = adapter_config(self._spec, self._spec.lora, str(self._base.absolute()))
        self._write_json(ADAPTER_CONFIG, config)


def weights_writer(
    source: Path,
    output: Path,
    spec: ModelSpec,
    weights: MasterWeights,
    dtype: torch.dtype,
    *,
    replace: bool = False,
    base: Path | None = None,
    files: Mapping[str, bytes] | None = None,
) -> HuggingFaceWriter:
    """The writer for what training a model changes: its adapters if it has any, else its weights.

    Without ``base`` adapters belong to ``source``.
    """
    if spec.lora is None:
        return HuggingFaceWriter(source, output, spec, weights, dtype, replace=replace, files=files)
    return AdapterWriter(
        source, output, spec, weights, replace=replace, base=base or source, files=files
    )


def adapter_config(spec: ModelSpec, lora: Lora, base: str) -> dict[str, object]:
    """What PEFT wants to know of adapters on the model ``base``, a folder or a name on the Hub."""
    keys = (p for unit in spec.adapters.values() for p in unit.params)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted({p.key.split(".")[-3] for p in keys}),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "inference_mode": True,
    }
