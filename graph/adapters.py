"""Low-rank adapters (LoRA) as units: a model's own units are frozen, and each layer gets one more.

    y = W x + alpha / rank · B (A x)

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022. Names are those of PEFT.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from slideformer.graph.errors import ConfigError
from slideformer.graph.model import (
    Lora,
    ModelSpec,
    ParamGroup,
    ParamSpec,
    UnitKind,
    UnitSpec,
    layout_unit,
)
from slideformer.graph.plan import MemoryPlan

PROJECTIONS = ("qkv", "o", "gate_up", "down")
"""The operands, without ``.weight``, that may have adapters."""


def with_adapters(spec: ModelSpec, lora: Lora) -> ModelSpec:
    """``spec`` with everything frozen, and behind each layer a unit with the adapters of it.

    The operands of that unit are, for each projection, ``….lora_A`` [parts·rank, inputs] and
    ``….lora_B`` [rows of the parts, rank]: the parts are the chosen modules that lie in it.

    Raises `ConfigError` for a module that the layers do not have.
    """
    known = sorted({module_of(p) for unit in spec.layers for _, p in _matrices(unit)})
    for module in lora.modules:
        if module not in known:
            raise ConfigError(
                f"lora: target_modules has {module!r}, but the layers of this model have "
                f"{', '.join(known)}"
            )
    units: list[UnitSpec] = []
    for unit in spec.units:
        units.append(replace(unit, params=tuple(replace(p, frozen=True) for p in unit.params)))
        if unit.kind is UnitKind.LAYER:
            units.append(_adapter(unit, lora))
    return replace(spec, units=tuple(units), lora=lora)


def adapted_parts(unit: UnitSpec, lora: Lora, projection: str) -> list[tuple[int, int]]:
    """Output rows ``[first, last)`` of a layer's projection that each of its adapters adds to."""
    rows: list[tuple[int, int]] = []
    end = 0
    for name, param in _matrices(unit):
        if name == projection:
            first, end = end, end + param.shape[0]
            if not lora.modules or module_of(param) in lora.modules:
                rows.append((first, end))
    return rows


def forward_nbytes(spec: ModelSpec, unit: UnitSpec, plan: MemoryPlan) -> int:
    """Bytes that the adapters of a layer read and write in forward on a micro-batch.

    Products as narrow as a rank take as long as their wide sides need to pass through memory: each
    projection's inputs are read, its outputs read and written.
    """
    return plan.micro_tokens * plan.compute.nbytes * _passed(spec, unit, inputs=1, outputs=2)


def backward_nbytes(spec: ModelSpec, unit: UnitSpec, plan: MemoryPlan, *, kept: bool) -> int:
    """The same in recompute and backward, as far as `backward_products` says.

    Inner products and their gradient are made once for the inputs' gradient and once for that of
    the adapters: outputs' gradients are read three times, inputs twice, and the inputs' gradient is
    read and written.
    """
    elements = _passed(spec, unit, inputs=4, outputs=3)
    if not kept:
        elements += _passed(spec, unit, inputs=1, outputs=2, without="down")
    return plan.micro_tokens * plan.compute.nbytes * elements


def module_of(param: ParamSpec) -> str:
    """The module that a parameter belongs to, as ``q_proj``."""
    return param.key.split(".")[-2]


def _matrices(unit: UnitSpec) -> Iterator[tuple[str, ParamSpec]]:
    """The parameters of a layer's projections, each with the name of the projection.

    Matrices of experts are none: a token passes only through those that the router chooses.
    """
    experts = any(operand.name == "router.weight" for operand in unit.operands)
    for operand in unit.operands:
        projection = operand.name.removesuffix(".weight")
        if experts and projection in ("gate_up", "down"):
            continue
        for param in unit.params:
            inside = operand.offset <= param.offset < operand.offset + operand.numel
            if inside and projection in PROJECTIONS:
                yield projection, param


def _passed(spec: ModelSpec, unit: UnitSpec, inputs: int, outputs: int, without: str = "") -> int:
    """Elements a token that pass, if each projection's sides do so many times."""
    adapter = spec.adapters.get(unit.name)
    total = 0
    for operand in adapter.operands if adapter else ():
        projection, _, side = operand.name.partition(".")
        if projection != without:
            rows, columns = operand.shape
            total += inputs * columns if side == "lora_A" else outputs * rows
    return total


def _adapter(unit: UnitSpec, lora: Lora) -> UnitSpec:
    groups: list[ParamGroup] = []
    for projection in PROJECTIONS:
        parts = [
            param
            for name, param in _matrices(unit)
            if name == projection and (not lora.modules or module_of(param) in lora.modules)
        ]
        if parts:
            stems = [param.key.removesuffix(".weight") for param in parts]
            a = [(f"{s}.lora_A.weight", (lora.rank, parts[0].shape[1])) for s in stems]
            b = [
                (f"{s}.lora_B.weight", (param.shape[0], lora.rank))
                for s, param in zip(stems, parts, strict=True)
            ]
            groups.append(ParamGroup(f"{projection}.lora_A", tuple(a), decay=True))
            groups.append(ParamGroup(f"{projection}.lora_B", tuple(b), decay=True))
    return layout_unit(f"A{unit.name[1:]}", UnitKind.ADAPTER, groups)
