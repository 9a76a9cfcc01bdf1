"""Settings that hold several values of their own, as lists and blocks in YAML."""

from __future__ import annotations

from typing import Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

S = TypeVar("S", bound="Section")


class Section(BaseModel):
    """Base of such settings; frozen, and unknown names are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ParameterGroup(Section):
    """How the parameters whose names match ``pattern`` are trained; the first match counts.

    What is not given is as for all other parameters.
    """

    pattern: str = Field(min_length=1)
    """Shell-style pattern of whole parameter names, as ``*.mlp.*`` or ``model.layers.[0-3].*``."""
    lr: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Learning rate where the run's is ``lr``; it follows the schedule in proportion."""
    lr_scale: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Factor of the run's learning rate, instead of ``lr``."""
    weight_decay: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Weight decay, whatever the parameters are."""
    frozen: bool = Field(default=False, strict=True)
    """Whether the parameters stay as they are."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        rates = {"lr": self.lr, "lr_scale": self.lr_scale, "weight_decay": self.weight_decay}
        given = [name for name, value in rates.items() if value is not None]
        if self.frozen and given:
            raise ValueError(
                f"frozen is true and {given[0]} is {rates[given[0]]}; give only one of them"
            )
        if self.lr is not None and self.lr_scale is not None:
            raise ValueError(
                f"lr is {self.lr} and lr_scale is {self.lr_scale}; give only one of them"
            )
        return self


class LoraSettings(Section):
    """Low-rank adapters to be trained while the model stays as it is."""

    rank: int = Field(strict=True, ge=1)
    """Rank of the adapters, ``r`` in PEFT."""
    alpha: float = Field(gt=0, allow_inf_nan=False)
    """Their product is multiplied by ``alpha`` / ``rank``; ``lora_alpha`` in PEFT."""
    target_modules: tuple[str, ...] = ()
    """Modules that get adapters, as ``q_proj`` and ``down_proj``; without any, all that can."""


def read_lora(value: Any) -> Any:
    """``lora`` as YAML has it; ValueError names the problem."""
    return None if value is None else _read(LoraSettings, value, "")


def read_groups(value: Any) -> Any:
    """``parameter_groups`` as YAML has it, as a tuple; ValueError names group and problem."""
    if not isinstance(value, list | tuple):
        raise ValueError(f"{value!r} is not a list; write '- pattern: …' for each group")
    return tuple(
        _read(ParameterGroup, group, f"group {number}: ")
        for number, group in enumerate(value, start=1)
    )


def _read(section: type[S], value: Any, where: str) -> S:
    """A section from its YAML; its first problem becomes a ValueError."""
    try:
        return section.model_validate(value)
    except ValidationError as error:
        problem = error.errors()[0]
    names = ", ".join(section.model_fields)
    if not problem["loc"]:
        found = problem.get("ctx", {}).get("error")
        message = f"{value!r} is not 'name: value' pairs" if found is None else str(found)
    elif problem["type"] == "missing":
        message = f"{problem['loc'][0]} is not set"
    elif problem["type"] == "extra_forbidden":
        message = f"unknown name {problem['loc'][0]!r}"
    else:
        limit = problem["msg"].replace("Input", "it", 1).replace("String", "it", 1)
        limit = limit.replace("a valid tuple", "a list")
        message = f"{problem['loc'][0]} is {problem['input']!r}: {limit}"
    raise ValueError(f"{where}{message}; the names are {names}")
