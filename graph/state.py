"""What an optimizer keeps of a unit: which arrays, of which types, and how many bytes they take.

The master is split into ``hi`` and ``lo``, and the moments are ``m`` and ``v``: FP32, or codes of 8
bits with ``scales``, two to a block of `BLOCK` elements. Even then the embedding has FP32 moments,
as the authors of 8-bit optimizers advise, and its rows are updated one by one; and so has an output
matrix whose rows are no whole blocks, since chunks end at rows. Arithmetic is in ``kernels/``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from slideformer.graph.model import ALIGNMENT, UnitKind, UnitSpec
from slideformer.graph.plan import Compute, MemoryPlan, Optimizer

BLOCK = ALIGNMENT
"""Elements that share the scales of their moments, as in ``kernels/quantise.py``; chunks of layers
begin at multiples of it."""


@dataclass(frozen=True, slots=True)
class Part:
    """An array of ``dtype`` with ``nbytes`` bytes for each ``span`` elements of its unit."""

    name: str
    dtype: str
    nbytes: int
    span: int = 1

    def size(self, numel: int) -> int:
        """Bytes for the first ``numel`` elements."""
        return self.nbytes * -(-numel // self.span)


HALVES = (Part("hi", "int16", 2), Part("lo", "int16", 2))
_FULL = (Part("m", "float32", 4), Part("v", "float32", 4))
_CODES = (Part("m", "uint8", 1), Part("v", "uint8", 1), Part("scales", "float32", 8, BLOCK))


def moment_parts(unit: UnitSpec, optimizer: Optimizer) -> tuple[Part, ...]:
    """The moments of a unit that is trained."""
    if optimizer is Optimizer.LION:
        return _FULL[:1]
    return _CODES if optimizer is Optimizer.ADAMW8BIT and _in_blocks(unit) else _FULL


def _in_blocks(unit: UnitSpec) -> bool:
    if unit.kind is UnitKind.HEAD:
        return unit.params[0].shape[-1] % BLOCK == 0
    return unit.kind is not UnitKind.EMBED


def state_parts(unit: UnitSpec, compute: Compute, optimizer: Optimizer) -> tuple[Part, ...]:
    """All arrays of a unit, ``hi`` first: a frozen one has no moments, nor in BF16 a lower half.

    What the upper half leaves out of a frozen weight is neither computed with nor changed.
    """
    if not unit.frozen:
        return (*HALVES, *moment_parts(unit, optimizer))
    return HALVES[:1] if compute is Compute.BF16 else HALVES


def parts_nbytes(parts: Iterable[Part], numel: int) -> int:
    """Bytes of these arrays together, for the first ``numel`` elements of their unit."""
    return sum(part.size(numel) for part in parts)


def state_nbytes(unit: UnitSpec, plan: MemoryPlan) -> int:
    """Bytes of a unit's state beside its upper halves."""
    return parts_nbytes(state_parts(unit, plan.compute, plan.optimizer)[1:], unit.numel)
