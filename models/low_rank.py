"""The arithmetic of low-rank adapters on projections, forward and backward (``graph/adapters.py``).

    y[:, rows_i] += scale · (x A_iᵀ) B_iᵀ      for each adapted part i of the projection

The inner products are as narrow as the rank, so they are computed again in backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from slideformer.graph.adapters import PROJECTIONS, adapted_parts
from slideformer.graph.model import Lora, UnitSpec
from slideformer.models.gradients import product_


@dataclass(frozen=True)
class LowRank:
    """The adapters of one projection with m inputs: ``a`` [n·r, m], ``b`` [Σ rows, r].

    ``parts`` are the output rows ``[first, last)`` that each of the n adds to.
    """

    a: Tensor
    b: Tensor
    parts: tuple[tuple[int, int], ...]
    scale: float

    def add_(self, out: Tensor, inputs: Tensor) -> None:
        """Add what they make of ``inputs`` [T, m] to the projection's output [T, n]."""
        inner = torch.mm(inputs, self.a.T)
        for columns, rank, rows in self._slices():
            out[:, columns].addmm_(inner[:, rank], self.b[rows].T, alpha=self.scale)

    def add_input_gradient_(self, d_inputs: Tensor, d_out: Tensor) -> None:
        """Add to the gradient of the inputs [T, m], from that of the output [T, n]."""
        d_inputs.addmm_(self._inner_gradient(d_out), self.a)

    def gradients(
        self, d_a: Tensor, d_b: Tensor, d_out: Tensor, inputs: Tensor, *, accumulate: bool
    ) -> None:
        """Gradients of ``a`` and ``b``, written or added as by :func:`product_`."""
        product_(d_a, self._inner_gradient(d_out).T, inputs, accumulate=accumulate)
        inner = torch.mm(inputs, self.a.T).mul_(self.scale)
        for columns, rank, rows in self._slices():
            product_(d_b[rows], d_out[:, columns].T, inner[:, rank], accumulate=accumulate)

    def _inner_gradient(self, d_out: Tensor) -> Tensor:
        """Gradient of the inner products [T, n·r]."""
        inner = d_out.new_empty(len(d_out), len(self.a))
        for columns, rank, rows in self._slices():
            torch.mm(d_out[:, columns], self.b[rows], out=inner[:, rank])
        return inner.mul_(self.scale)

    def _slices(self) -> Iterator[tuple[slice, slice, slice]]:
        """Of each part: columns of the output, columns of the inner products, rows of ``b``."""
        rank, start = self.b.shape[1], 0
        for i, (first, last) in enumerate(self.parts):
            end = start + last - first
            yield slice(first, last), slice(i * rank, (i + 1) * rank), slice(start, end)
            start = end


class AdaptedOperands(dict[str, Tensor]):
    """Operands of a layer, and the adapters of its projections by the projection's name."""

    def __init__(
        self, base: Mapping[str, Tensor], adapter: Mapping[str, Tensor], unit: UnitSpec, lora: Lora
    ) -> None:
        super().__init__(base)
        self.adapters = {
            name: LowRank(
                adapter[f"{name}.lora_A"],
                adapter[f"{name}.lora_B"],
                tuple(adapted_parts(unit, lora, name)),
                lora.scale,
            )
            for name in PROJECTIONS
            if f"{name}.lora_A" in adapter
        }


def adapters_of(w: Mapping[str, Tensor]) -> Mapping[str, LowRank]:
    """The adapters that operands come with, by projection."""
    return w.adapters if isinstance(w, AdaptedOperands) else {}
