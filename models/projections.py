"""Linear maps of a layer, forward and backward, over operands that lie in slots.

An operand is found by its name: ``qkv.weight`` and, where a configuration has it, ``qkv.bias``.
Nothing here knows what the maps are for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from slideformer.models.gradients import product_, store_

Operands = Mapping[str, Tensor]
"""Operand name → tensor, a view of a slot."""


def linear(inputs: Tensor, w: Operands, name: str, out: Tensor | None = None) -> Tensor:
    """inputs Wᵀ + bias, in ``out`` if given; the bias rides in the product's epilogue."""
    bias = w.get(f"{name}.bias")
    if bias is None:
        return torch.mm(inputs, w[f"{name}.weight"].T, out=out)
    return torch.addmm(bias, inputs, w[f"{name}.weight"].T, out=out)


def residual_linear(
    residual: Tensor, inputs: Tensor, w: Operands, name: str, *, out: Tensor
) -> None:
    """out = residual + inputs Wᵀ + bias; the residual rides in the product; may be ``out``."""
    torch.addmm(residual, inputs, w[f"{name}.weight"].T, out=out)
    bias = w.get(f"{name}.bias")
    if bias is not None:
        out.add_(bias)


class Gradients(NamedTuple):
    """Where weight gradients go, and whether they are added to what is there."""

    slots: Operands
    accumulate: bool

    def linear(self, name: str, d_out: Tensor, inputs: Tensor) -> None:
        """Gradients of a projection's matrix and bias; ``d_out`` [T, n], ``inputs`` [T, m]."""
        product_(self.slots[f"{name}.weight"], d_out.T, inputs, accumulate=self.accumulate)
        if f"{name}.bias" in self.slots:
            self.vector(f"{name}.bias", d_out.sum(0, dtype=torch.float32))

    def vector(self, name: str, value: Tensor) -> None:
        """A gradient already reduced over tokens, FP32."""
        store_(self.slots[name], value, accumulate=self.accumulate)
