"""The shape of a model as the planner and the step compiler see it: units, parameters, costs.

A *unit* is a slice of the model that is streamed as a whole. A decoder model has the units
``embed`` (the token matrix), ``L00`` … (decoder layers), ``norm`` (the final norm) and ``head``
(the output matrix; absent when it is tied to ``embed``). Weights, names and arithmetic live in
``models/``; this module knows sizes only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction
from functools import cached_property

ALIGNMENT = 128
"""Elements to which the start of each operand in its unit is rounded up (256 bytes in BF16)."""


class UnitKind(StrEnum):
    """What a unit is; the step compiler treats each kind differently."""

    EMBED = "embed"
    LAYER = "layer"
    ADAPTER = "adapter"
    NORM = "norm"
    HEAD = "head"


@dataclass(frozen=True, slots=True)
class ParamSpec:
    """One parameter of a unit.

    ``key`` is its full name in a model folder (``model.layers.7.self_attn.q_proj.weight``),
    ``offset`` the index of its first element in the unit's flat storage, ``decay`` whether weight
    decay is for it, as for matrices. ``lr_scale`` multiplies the learning rate of a step, and
    ``weight_decay`` replaces the run's. A ``frozen`` parameter is used and never changed.
    """

    key: str
    shape: tuple[int, ...]
    offset: int
    decay: bool
    lr_scale: float = 1.0
    weight_decay: float | None = None
    frozen: bool = False

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class OperandSpec:
    """One tensor as the arithmetic sees it: one parameter, or several stacked on their first axis.

    The query, key and value matrices of a layer lie one after another, so they are also one matrix
    ``qkv.weight`` and need one product instead of three.
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    share: Fraction = Fraction(1)
    """Share of it that one token uses: less than 1 for experts, of which a token takes some."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class UnitSpec:
    """One unit: parameters laid out one after another in a flat storage of ``numel`` elements.

    ``numel`` includes the padding between operands; padding is zero and stays zero.
    """

    name: str
    kind: UnitKind
    params: tuple[ParamSpec, ...]
    operands: tuple[OperandSpec, ...]
    numel: int

    @cached_property
    def param_count(self) -> int:
        """Number of elements, padding excluded."""
        return sum(p.numel for p in self.params)

    @cached_property
    def frozen(self) -> bool:
        """Whether all its parameters are: then it has no gradient and no optimizer state."""
        return all(p.frozen for p in self.params)

    @cached_property
    def matrix_numel(self) -> int:
        """Elements of the operands with two axes that multiply a token, once each in forward."""
        return sum(int(o.share * o.numel) for o in self.operands if len(o.shape) == 2)

    @cached_property
    def token_share(self) -> Fraction:
        """Share of the tokens that its largest matrices multiply at once: experts take some."""
        matrices = [o for o in self.operands if len(o.shape) == 2]
        return max(matrices, key=lambda o: o.numel).share


@dataclass(frozen=True, slots=True)
class Lora:
    """Low-rank adapters of that rank on the projections named ``modules`` (none: on all)."""

    rank: int
    alpha: float
    modules: tuple[str, ...] = ()

    @property
    def scale(self) -> float:
        """What the product of both matrices is multiplied by."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class ModelSpec:
    """A decoder-only language model as a list of units in forward order."""

    family: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    vocab: int
    max_positions: int
    tied: bool
    units: tuple[UnitSpec, ...]
    windows: tuple[int, ...] = ()
    """Distinct sliding-window lengths of its layers."""
    balanced: int = 0
    """Experts of a layer where a loss balances their load, else 0."""
    output_norms: bool = False
    """Whether norms follow the projections that add to the stream; backward makes those again."""
    softcapped: bool = False
    """Whether the scores of its attention are capped, which flash attention cannot do."""
    ropes: int = 1
    """Rotary embeddings: tables of cosines and sines that all steps share."""
    lora: Lora | None = None
    """The adapters of its layers, where those are trained and the model is not."""

    @cached_property
    def layers(self) -> tuple[UnitSpec, ...]:
        """The decoder layers in forward order."""
        return tuple(u for u in self.units if u.kind is UnitKind.LAYER)

    @cached_property
    def embed(self) -> UnitSpec:
        """The token embedding: one parameter of shape [vocab, hidden]."""
        return next(u for u in self.units if u.kind is UnitKind.EMBED)

    @cached_property
    def norm(self) -> UnitSpec:
        """The final norm."""
        return next(u for u in self.units if u.kind is UnitKind.NORM)

    @cached_property
    def head(self) -> UnitSpec:
        """The unit that holds the output matrix [vocab, hidden]: ``embed`` when tied."""
        return self.embed if self.tied else self.unit("head")

    @cached_property
    def param_count(self) -> int:
        """Number of parameters, frozen ones included; tied matrices count once."""
        return sum(u.param_count for u in self.units)

    @cached_property
    def trained_count(self) -> int:
        """Number of parameters that are trained."""
        return sum(p.numel for u in self.units for p in u.params if not p.frozen)

    @cached_property
    def lowest_trained(self) -> int:
        """Position of the layer at which backward ends: the first one that is trained.

        0 if the embedding is trained, and the number of layers if neither is any layer.
        """
        if not self.embed.frozen:
            return 0
        trained = (
            i for i, unit in enumerate(self.layers) if not unit.frozen or unit.name in self.adapters
        )
        return next(trained, len(self.layers))

    @cached_property
    def adapters(self) -> dict[str, UnitSpec]:
        """Layer → the unit with its adapters."""
        return {f"L{u.name[1:]}": u for u in self.units if u.kind is UnitKind.ADAPTER}

    @cached_property
    def own_units(self) -> tuple[UnitSpec, ...]:
        """The units that the model folder has: all but adapters."""
        return tuple(u for u in self.units if u.kind is not UnitKind.ADAPTER)

    @cached_property
    def saved_units(self) -> tuple[UnitSpec, ...]:
        """The units that training changes in such a way that all of them are saved.

        Those are the adapters, where there are any: the rest stays what the model folder has.
        """
        return tuple(self.adapters.values()) or self.units

    def unit(self, name: str) -> UnitSpec:
        """The unit of that name."""
        return self._by_name[name]

    @cached_property
    def _by_name(self) -> dict[str, UnitSpec]:
        return {unit.name: unit for unit in self.units}


@dataclass(frozen=True, slots=True)
class ParamGroup:
    """Parameters of one operand before layout: ``(key, shape)`` in stacking order.

    ``share`` is that of the operand.
    """

    operand: str
    params: tuple[tuple[str, tuple[int, ...]], ...]
    decay: bool
    share: Fraction = Fraction(1)


def layout_unit(name: str, kind: UnitKind, groups: Sequence[ParamGroup]) -> UnitSpec:
    """Lay groups out one after another; the parameters of a group touch, groups are aligned."""
    params: list[ParamSpec] = []
    operands: list[OperandSpec] = []
    offset = 0
    for group in groups:
        offset = start = -(-offset // ALIGNMENT) * ALIGNMENT
        for key, shape in group.params:
            param = ParamSpec(key, shape, offset, group.decay)
            params.append(param)
            offset += param.numel
        rows = sum(shape[0] for _, shape in group.params)
        shape = (rows, *group.params[0][1][1:])
        operands.append(OperandSpec(group.operand, shape, start, group.share))
    return UnitSpec(name, kind, tuple(params), tuple(operands), offset)
