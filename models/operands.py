"""Views of a unit's flat storage: its operands, what lies between them, and what is trained.

An operand may stack trained and frozen parameters: its gradient is then computed whole, and that of
the frozen ones zeroed.
"""

from __future__ import annotations

from torch import Tensor

from slideformer.graph.model import OperandSpec, ParamSpec, UnitSpec


def operands(flat: Tensor, unit: UnitSpec) -> dict[str, Tensor]:
    """Views of a unit's operands in its flat storage."""
    return {o.name: flat[o.offset : o.offset + o.numel].view(o.shape) for o in unit.operands}


def padding(flat: Tensor, unit: UnitSpec) -> list[Tensor]:
    """Views of what lies between a unit's operands in its flat storage."""
    ends = [0, *(o.offset + o.numel for o in unit.operands)]
    starts = [*(o.offset for o in unit.operands), unit.numel]
    return [flat[a:b] for a, b in zip(ends, starts, strict=True) if a < b]


def trained_operands(flat: Tensor, unit: UnitSpec) -> dict[str, Tensor]:
    """Views of the operands that hold a trained parameter."""
    frozen = {o.name for o in unit.operands if all(p.frozen for p in _params(unit, o))}
    return {name: view for name, view in operands(flat, unit).items() if name not in frozen}


def never_written(flat: Tensor, unit: UnitSpec) -> list[Tensor]:
    """Views of what no gradient is written to: padding, and operands that are frozen."""
    trained = trained_operands(flat, unit)
    frozen = [view.view(-1) for name, view in operands(flat, unit).items() if name not in trained]
    return [*padding(flat, unit), *frozen]


def written_in_vain(flat: Tensor, unit: UnitSpec) -> list[Tensor]:
    """Views of the frozen parameters that share an operand with trained ones."""
    return [
        flat[param.offset : param.offset + param.numel]
        for operand in unit.operands
        if not all(p.frozen for p in _params(unit, operand))
        for param in _params(unit, operand)
        if param.frozen
    ]


def _params(unit: UnitSpec, operand: OperandSpec) -> list[ParamSpec]:
    """The parameters that lie in an operand."""
    end = operand.offset + operand.numel
    return [p for p in unit.params if operand.offset <= p.offset < end]
