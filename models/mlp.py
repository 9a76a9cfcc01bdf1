"""The gated MLP of a decoder layer with its norm and residual, forward and backward.

    y = x + Down · swiglu(GateUp · rms_norm(x))

Operands are ``post_norm``, ``gate_up`` and ``down`` as :func:`slideformer.models.layer.forward`
describes them. Call under ``torch.no_grad()``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slideformer.kernels.rms_norm import rms_norm, rms_norm_backward
from slideformer.kernels.swiglu import swiglu, swiglu_backward
from slideformer.models.decoder import DecoderConfig
from slideformer.models.projections import Gradients, Operands, linear, residual_linear


def mlp_forward(
    x: Tensor, w: Operands, cfg: DecoderConfig, gate_up: Tensor | None, *, out: Tensor
) -> None:
    """The output for ``x`` [T, h] in ``out``, which may be ``x``.

    ``gate_up`` [T, 2I] receives the projections, for :func:`mlp_backward_` to use instead of
    computing them again.
    """
    normed, _ = rms_norm(x, w["post_norm.weight"], cfg.norm_eps)
    gate_up = linear(normed, w, "gate_up", out=gate_up)
    del normed
    activated = swiglu(gate_up, cfg.activation)
    del gate_up
    residual_linear(x, activated, w, "down", out=out)


def mlp_backward_(
    x: Tensor,
    d_stream: Tensor,
    w: Operands,
    sink: Gradients,
    cfg: DecoderConfig,
    gate_up: Tensor | None = None,
) -> None:
    """Recompute from the input ``x`` [T, h] and turn ``d_stream`` [T, h] from dy into dx in place.

    The down projection is not recomputed: no gradient needs its output. ``gate_up``, if forward
    kept it, is overwritten.
    """
    normed, rstd = rms_norm(x, w["post_norm.weight"], cfg.norm_eps)
    if gate_up is None:
        gate_up = linear(normed, w, "gate_up")
    d_activated = torch.mm(d_stream, w["down.weight"])
    # Both are overwritten: the activation's gradient by the activation, gate and up by their own.
    activated = swiglu_backward(d_activated, gate_up, cfg.activation, out=d_activated)
    d_gate_up = gate_up
    sink.linear("down", d_stream, activated)
    del d_activated, activated
    sink.linear("gate_up", d_gate_up, normed)
    d_normed = torch.mm(d_gate_up, w["gate_up.weight"], out=normed)
    del gate_up, d_gate_up
    _, d_weight = rms_norm_backward(
        d_normed, x, w["post_norm.weight"], rstd, residual_grad=d_stream, out=d_stream
    )
    sink.vector("post_norm.weight", d_weight)
