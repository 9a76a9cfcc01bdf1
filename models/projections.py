"""Linear maps and norms of a layer, forward and backward, over operands that lie in slots.

An operand is found by its name: ``qkv.weight`` and, where a configuration has it, ``qkv.bias``.
Nothing here knows what the maps are for.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from slideformer.kernels.grouped import grouped_gradient_
from slideformer.kernels.rms_norm import rms_norm, rms_norm_backward
from slideformer.models.decoder import DecoderConfig
from slideformer.models.gradients import product_, store_
from slideformer.models.low_rank import LowRank, adapters_of

Operands = Mapping[str, Tensor]
"""Operand name → tensor, a view of a slot."""


class Gradients(NamedTuple):
    """Where weight gradients go, and whether they are added to what is there.

    What has no slot is frozen: its gradient is not computed.
    """

    slots: Operands
    accumulate: bool
    adapters: Mapping[str, LowRank] = MappingProxyType({})

    def linear(self, name: str, d_out: Tensor, inputs: Tensor) -> None:
        """Gradients of a projection's operands; ``d_out`` [T, n], ``inputs`` [T, m]."""
        if name in self.adapters:
            a, b = self.slots[f"{name}.lora_A"], self.slots[f"{name}.lora_B"]
            self.adapters[name].gradients(a, b, d_out, inputs, accumulate=self.accumulate)
        if f"{name}.weight" in self.slots:
            product_(self.slots[f"{name}.weight"], d_out.T, inputs, accumulate=self.accumulate)
        if f"{name}.bias" in self.slots:
            self.vector(f"{name}.bias", d_out.sum(0, dtype=torch.float32))

    def grouped(self, name: str, d_out: Tensor, inputs: Tensor, ends: Tensor) -> None:
        """Gradients of a matrix per group of rows; see ``kernels/grouped.py``."""
        if f"{name}.weight" in self.slots:
            stacked = self.slots[f"{name}.weight"]
            out = stacked.view(len(ends), -1, stacked.shape[1])
            grouped_gradient_(out, d_out, inputs, ends, accumulate=self.accumulate)

    def vector(self, name: str, value: Tensor) -> None:
        """A gradient already reduced over tokens, FP32."""
        if name in self.slots:
            store_(self.slots[name], value, accumulate=self.accumulate)


def linear(inputs: Tensor, w: Operands, name: str, out: Tensor | None = None) -> Tensor:
    """inputs Wᵀ + bias, in ``out`` if given; the bias rides in the product's epilogue."""
    bias = w.get(f"{name}.bias")
    if bias is None:
        out = torch.mm(inputs, w[f"{name}.weight"].T, out=out)
    else:
        out = torch.addmm(bias, inputs, w[f"{name}.weight"].T, out=out)
    _adapt_(out, inputs, w, name)
    return out


def input_gradient(d_out: Tensor, w: Operands, name: str, out: Tensor | None = None) -> Tensor:
    """Back through :func:`linear`: gradient of the inputs [T, m], in ``out`` if given."""
    out = torch.mm(d_out, w[f"{name}.weight"], out=out)
    adapter = adapters_of(w).get(name)
    if adapter is not None:
        adapter.add_input_gradient_(out, d_out)
    return out


def _adapt_(out: Tensor, inputs: Tensor, w: Operands, name: str) -> None:
    """Add what a projection's adapters make of its inputs, if it has any."""
    adapter = adapters_of(w).get(name)
    if adapter is not None:
        adapter.add_(out, inputs)


def norm(
    x: Tensor, w: Operands, name: str, cfg: DecoderConfig, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """RMSNorm of ``x`` [..., n], in ``out`` if given, which may be ``x``; and its rstd."""
    return rms_norm(x, w[f"{name}.weight"], cfg.norm_eps, out, centred=cfg.centred)


def norm_backward(
    dy: Tensor,
    x: Tensor,
    w: Operands,
    sink: Gradients,
    name: str,
    cfg: DecoderConfig,
    rstd: Tensor,
    *,
    residual_grad: Tensor | None = None,
    out: Tensor,
) -> None:
    """Back through :func:`norm`: gradient of ``x``, plus ``residual_grad``, in ``out``.

    ``out`` may be any of the inputs but ``rstd``.
    """
    weight = w[f"{name}.weight"]
    _, d_weight = rms_norm_backward(dy, x, weight, rstd, residual_grad, out, centred=cfg.centred)
    sink.vector(f"{name}.weight", d_weight)


def residual_linear(
    residual: Tensor, inputs: Tensor, w: Operands, name: str, cfg: DecoderConfig, *, out: Tensor
) -> None:
    """out = residual + inputs Wᵀ + bias, the latter through a norm if the model has output norms.

    Without one the residual rides in the product. ``out`` may be ``residual``.
    """
    if cfg.output_norms:
        projected = linear(inputs, w, name)
        norm(projected, w, f"{name}_norm", cfg, out=projected)
        torch.add(residual, projected, out=out)
        return
    torch.addmm(residual, inputs, w[f"{name}.weight"].T, out=out)
    bias = w.get(f"{name}.bias")
    if bias is not None:
        out.add_(bias)
    _adapt_(out, inputs, w, name)


def output_norm_backward(
    d_out: Tensor, inputs: Tensor, w: Operands, sink: Gradients, name: str, cfg: DecoderConfig
) -> Tensor:
    """Back through an output norm: the gradient of inputs Wᵀ + bias, which is computed again."""
    projected = linear(inputs, w, name)
    _, rstd = norm(projected, w, f"{name}_norm", cfg)
    norm_backward(d_out, projected, w, sink, f"{name}_norm", cfg, rstd, out=projected)
    return projected
