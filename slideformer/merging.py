"""Adapters in the files of PEFT, merged into the model they belong to: W + alpha / rank · B A.

A unit of the model is read, changed in FP32 and written at a time; nothing is trained.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slideformer.graph.errors import CheckpointError
from slideformer.graph.model import ModelSpec
from slideformer.kernels.split import join_master, split_master
from slideformer.models.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PREFIX
from slideformer.models.export import HuggingFaceWriter
from slideformer.models.families import read_model_config
from slideformer.models.safetensors_file import DTYPES, StoredTensor, read_header, read_range
from slideformer.models.stored_weights import check_weights
from slideformer.models.units import model_spec
from slideformer.models.weights import load_weights

_PLAIN: dict[str, Any] = {
    "peft_type": "LORA",
    "bias": "none",
    "fan_in_fan_out": False,
    "use_rslora": False,
    "use_dora": False,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "layer_replication": None,
}
"""What an adapter's configuration must not differ from, where it has it, to be plain LoRA."""


def merge_adapters(adapter: Path, output: Path, base: Path | None = None) -> Path:
    """Write the model of an adapter folder with the adapters in it; returns where it lies.

    ``base`` is the model's folder, otherwise the one that the adapter folder names. Values are
    rounded to the dtype that the model is stored in.

    Raises:
        CheckpointError: a folder is missing or damaged, holds other adapters than plain LoRA or
            adapters of another model, or ``output`` cannot be written.
        UnsupportedModelError: the model's family is not supported.
    """
    described = _read_config(adapter / ADAPTER_CONFIG)
    folder = base or Path(str(described.get("base_model_name_or_path")))
    if not folder.is_dir():
        raise CheckpointError(
            f"{adapter / ADAPTER_CONFIG} belongs to the model {folder}, which is no folder here; "
            "name its folder with --model"
        )
    spec = model_spec(read_model_config(folder))
    dtype = check_weights(folder, spec)
    rank = int(described["r"])
    additions = _additions(adapter / ADAPTER_WEIGHTS, spec, rank)
    scale = float(described["lora_alpha"]) / rank
    largest = max(unit.numel for unit in spec.units)
    hi, lo = torch.empty(2, largest, dtype=torch.int16)
    masters = {unit.name: (hi[: unit.numel], lo[: unit.numel]) for unit in spec.units}
    with HuggingFaceWriter(folder, output, spec, masters, dtype) as writer:

        def filled(name: str) -> None:
            for param in spec.unit(name).params:
                pair = additions.get(param.key)
                if pair is not None:
                    where = slice(param.offset, param.offset + param.numel)
                    values = torch.empty(param.numel)
                    join_master(hi[where], lo[where], values)
                    a, b = (_read(stored) for stored in pair)
                    values.view(param.shape).addmm_(b, a, alpha=scale)
                    if not values.isfinite().all():
                        raise CheckpointError(
                            f"{pair[0].path}: with its adapters {param.key} is not finite; the "
                            "training diverged, so use an earlier checkpoint"
                        )
                    split_master(values, hi[where], lo[where])
            writer.write_unit(name)

        load_weights(folder, spec, masters, filled)
        return writer.finish()


def _read_config(path: Path) -> dict[str, Any]:
    """The configuration of plain LoRA adapters."""
    try:
        described: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        rank, alpha = int(described["r"]), float(described["lora_alpha"])
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror or error}; name a folder of adapters"
        ) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r})") from error
    if rank < 1 or not math.isfinite(alpha):
        raise CheckpointError(
            f"{path}: r is {rank} and lora_alpha is {alpha}; a rank of at least 1 and a finite "
            "number are needed"
        )
    for name, plain in _PLAIN.items():
        if described.get(name, plain) not in (plain, None):
            raise CheckpointError(
                f"{path}: {name} is {described[name]!r}; only plain LoRA, with {plain!r}, can be "
                "merged"
            )
    return described


def _additions(
    path: Path, spec: ModelSpec, rank: int
) -> dict[str, tuple[StoredTensor, StoredTensor]]:
    """Parameter → the matrices A and B that are added to it."""
    stored = read_header(path)
    if not stored:
        raise CheckpointError(f"{path} holds no adapters; name a folder that does")
    shapes = {param.key: param.shape for unit in spec.units for param in unit.params}
    found: dict[str, tuple[StoredTensor, StoredTensor]] = {}
    for key, a in stored.items():
        stem = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        b = stored.get(f"{PREFIX}{stem}.lora_B.weight")
        if key.endswith(".lora_B.weight") and f"{key[:-13]}lora_A.weight" in stored:
            continue
        shape = shapes.get(f"{stem}.weight")
        if b is not None and shape is not None and a.shape[:1] != (rank,):
            raise CheckpointError(
                f"{path}: {key} has the shape {tuple(a.shape)}, but r is {rank} in "
                f"{ADAPTER_CONFIG}; use the two files of one run"
            )
        if (
            b is None
            or shape is None
            or (a.shape, b.shape) != ((rank, *shape[1:]), (shape[0], rank))
        ):
            raise CheckpointError(
                f"{path}: {key} is no adapter of this model; name the model it belongs to with "
                "--model"
            )
        if a.dtype not in DTYPES or b.dtype not in DTYPES:
            raise CheckpointError(f"{path}: {key} is stored as {a.dtype}, which cannot be merged")
        found[f"{stem}.weight"] = (a, b)
    return found


def _read(stored: StoredTensor) -> Tensor:
    """All of a stored tensor, in FP32."""
    raw = torch.empty(stored.nbytes, dtype=torch.uint8)
    read_range(stored, 0, raw.numpy().data)
    return raw.view(DTYPES[stored.dtype]).view(stored.shape).float()
