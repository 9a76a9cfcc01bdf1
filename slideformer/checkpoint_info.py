"""What a checkpoint says of itself: of which model and run it is, and where its state lies."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Self

import torch
from pydantic import BaseModel, ConfigDict, Field

from slideformer.graph.model import ModelSpec, UnitSpec
from slideformer.graph.plan import Compute, MemoryPlan, Optimizer
from slideformer.graph.state import parts_nbytes, state_parts

UNITS = "units/"
"""Within a checkpoint: the folder of the units' files."""


class CheckpointInfo(BaseModel):
    """What a checkpoint says of itself; ``training`` is what the one who trained had to add.

    ``skipped`` of the steps changed nothing, as their gradients were not finite. ``stored`` is the
    dtype of the model folder that training began from, ``plan`` the digest of the memory plan,
    ``model`` what must be the same of a model to go on with, ``frozen`` the units that have weights
    alone. Of a run that trains adapters it holds them alone; ``lora`` describes them, ``base`` is
    the model folder that they belong to and ``base_weights`` the digest of its weights.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: int = Field(ge=0)
    skipped: int = Field(default=0, ge=0)
    stored: Annotated[str, Field(pattern="^(float32|bfloat16|float16)$")]
    numerics: dict[str, str | int]
    plan: str
    model: dict[str, str | int]
    frozen: tuple[str, ...] = ()
    optimizer: Optimizer = Optimizer.ADAMW
    lora: dict[str, Any] | None = None
    base: str = ""
    base_weights: str = ""
    training: dict[str, Any] = {}

    @classmethod
    def of(
        cls,
        step: int,
        spec: ModelSpec,
        plan: MemoryPlan,
        numerics: Mapping[str, str | int],
        stored: torch.dtype,
        base: Path,
        base_weights: str,
    ) -> Self:
        """That of a run after ``step`` steps from the model folder ``base``."""
        return cls(
            step=step,
            stored=str(stored).removeprefix("torch."),
            numerics=dict(numerics),
            plan=digest({**asdict(plan), "resident": sorted(plan.resident)}),
            model=model_identity(spec),
            frozen=frozen_units(spec),
            optimizer=plan.optimizer,
            lora=None if spec.lora is None else asdict(spec.lora),
            base=str(base.absolute()),
            base_weights=base_weights,
        )

    @property
    def compute(self) -> Compute:
        """The precision of its forward and backward."""
        return Compute(str(self.numerics["compute"]))

    def offset(self, unit: UnitSpec, name: str, begin: int) -> int:
        """Where the elements of an array from ``begin`` on are in a unit's file."""
        parts = state_parts(unit, self.compute, self.optimizer)
        position = [part.name for part in parts].index(name)
        return parts_nbytes(parts[:position], unit.numel) + parts[position].size(begin)


def file_sizes(spec: ModelSpec, compute: Compute, optimizer: Optimizer) -> dict[str, int]:
    """Bytes of the file of each unit in a checkpoint, by name."""
    return {
        unit_file(unit): parts_nbytes(state_parts(unit, compute, optimizer), unit.numel)
        for unit in spec.saved_units
    }


def frozen_units(spec: ModelSpec) -> tuple[str, ...]:
    """Names of the units that are frozen."""
    return tuple(unit.name for unit in spec.units if unit.frozen)


def model_identity(spec: ModelSpec) -> dict[str, str | int]:
    """What must be the same of two models for the state of one to be that of the other."""
    names = ("family", "hidden", "intermediate", "heads", "kv_heads", "head_dim", "vocab", "tied")
    lora = spec.lora
    layout = [[u.name, u.numel, [[p.key, p.shape, p.offset] for p in u.params]] for u in spec.units]
    return {
        **{name: getattr(spec, name) for name in names},
        "layers": len(spec.layers),
        "adapters": "none" if lora is None else f"rank {lora.rank}, alpha {lora.alpha:g}",
        "layout": digest(layout),
    }


def digest(value: Any) -> str:
    """SHA-256, in hexadecimal, of a value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def unit_file(unit: UnitSpec) -> str:
    """Name of a unit's file within a checkpoint."""
    return f"{UNITS}{unit.name}"
