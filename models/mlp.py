"""The gated MLP of a decoder layer with its norms and residual, forward and backward.

    y = x + Down · swiglu(GateUp · rms_norm(x))

Operands are ``post_norm``, ``gate_up``, ``down`` and ``down_norm`` as
:func:`slideformer.models.layer.forward` describes them. Call under ``torch.no_grad()``.
"""

from __future__ import annotations

from torch import Tensor

from slideformer.kernels.swiglu import swiglu, swiglu_backward
from slideformer.models.decoder import DecoderConfig
from slideformer.models.projections import (
    Gradients,
    Operands,
    input_gradient,
    linear,
    norm,
    norm_backward,
    output_norm_backward,
    residual_linear,
)


def mlp_forward(
    x: Tensor, w: Operands, cfg: DecoderConfig, gate_up: Tensor | None, *, out: Tensor
) -> None:
    """The output for ``x`` [T, h] in ``out``, which may be ``x``.

    ``gate_up`` [T, 2I] receives the projections, for :func:`mlp_backward_` to use instead of
    computing them again.
    """
    normed, _ = norm(x, w, "post_norm", cfg)
    gate_up = linear(normed, w, "gate_up", out=gate_up)
    del normed
    activated = swiglu(gate_up, cfg.activation)
    del gate_up
    residual_linear(x, activated, w, "down", cfg, out=out)


def mlp_backward_(
    x: Tensor,
    d_stream: Tensor,
    w: Operands,
    sink: Gradients,
    cfg: DecoderConfig,
    gate_up: Tensor | None = None,
) -> None:
    """Recompute from the input ``x`` [T, h] and turn ``d_stream`` [T, h] from dy into dx in place.

    The down projection is recomputed only where a norm follows it: no other gradient needs its
    output. ``gate_up``, if forward kept it, is overwritten.
    """
    normed, rstd = norm(x, w, "post_norm", cfg)
    if gate_up is None:
        gate_up = linear(normed, w, "gate_up")
    d_out = d_stream
    if cfg.output_norms:
        activated = swiglu(gate_up, cfg.activation)
        d_out = output_norm_backward(d_stream, activated, w, sink, "down", cfg)
        del activated
    d_activated = input_gradient(d_out, w, "down")
    # Both are overwritten: the activation's gradient by the activation, gate and up by their own.
    activated = swiglu_backward(d_activated, gate_up, cfg.activation, out=d_activated)
    d_gate_up = gate_up
    sink.linear("down", d_out, activated)
    del d_activated, activated, d_out
    sink.linear("gate_up", d_gate_up, normed)
    d_normed = input_gradient(d_gate_up, w, "gate_up", out=normed)
    del gate_up, d_gate_up
    norm_backward(
        d_normed, x, w, sink, "post_norm", cfg, rstd, residual_grad=d_stream, out=d_stream
    )
