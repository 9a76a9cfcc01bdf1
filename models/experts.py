"""The experts of a decoder layer with their router, norm and residual, forward and backward.

    y = x + Σ over the chosen experts of weight · Down · swiglu(GateUp · rms_norm(x))

(Shazeer et al., 2017, arXiv 1701.06538; Jiang et al., Mixtral, 2024, arXiv 2401.04088.) Each token
is copied once per chosen expert and the copies are sorted by expert, so that each projection is one
grouped product, whatever the router decides. No token is dropped. Operands are ``post_norm`` and,
with E experts of width I, ``router.weight`` [E, h], ``gate_up.weight`` [E·2I, h] (of each expert
the gate rows first) and ``down.weight`` [E·h, I]. Call under ``torch.no_grad()``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from slideformer.kernels.grouped import grouped_product
from slideformer.kernels.routed import gather_sum, row_products
from slideformer.kernels.swiglu import swiglu, swiglu_backward
from slideformer.models.balance import Balance
from slideformer.models.decoder import DecoderConfig, Experts
from slideformer.models.projections import Gradients, Operands, linear, norm, norm_backward


class Routes(NamedTuple):
    """Which experts each of T tokens takes, and where its copies are among the R = T·k rows."""

    probabilities: Tensor
    """FP32 [T, E]."""
    chosen: Tensor
    """int64 [T, k]: the experts."""
    weights: Tensor
    """FP32 [T, k]: their shares of the output."""
    order: Tensor
    """int64 [R]: row r is copy ``order[r] % k`` of token ``order[r] // k``."""
    places: Tensor
    """int64 [T, k]: the row of each copy."""
    ends: Tensor
    """int32 [E]: the row behind each expert's last."""

    @property
    def tokens(self) -> Tensor:
        """The token of each row, int64 [R]."""
        return self.order // self.chosen.shape[1]


def route(normed: Tensor, w: Operands, experts: Experts) -> Routes:
    """Choose experts for ``normed`` [T, h]; nothing waits for the device."""
    logits = linear(normed, w, "router")
    probabilities = torch.softmax(logits.float(), dim=-1)
    weights, chosen = torch.topk(probabilities, experts.chosen, dim=-1)
    if experts.normalise:
        weights = weights / weights.sum(-1, keepdim=True)
    by_expert, order = torch.sort(chosen.flatten(), stable=True)
    numbers = torch.arange(experts.count, device=normed.device)
    ends = torch.searchsorted(by_expert, numbers, right=True, out_int32=True)
    rows = torch.arange(len(order), device=normed.device)
    places = torch.empty_like(order).scatter_(0, order, rows)
    return Routes(probabilities, chosen, weights, order, places.view(chosen.shape), ends)


def experts_forward(
    x: Tensor,
    w: Operands,
    cfg: DecoderConfig,
    gate_up: Tensor | None,
    balance: Balance | None,
    *,
    out: Tensor,
) -> None:
    """The output for ``x`` [T, h] in ``out``, which may be ``x``.

    ``gate_up`` [T, k·2I] receives the projections, for :func:`experts_backward_` to use instead of
    computing them again. ``balance`` counts what the router does.
    """
    experts = _experts(cfg)
    normed, _ = norm(x, w, "post_norm", cfg)
    routes = route(normed, w, experts)
    if balance is not None:
        balance.add(routes.probabilities, routes.tokens, routes.ends)
    rows = normed.index_select(0, routes.tokens)
    del normed
    projected = grouped_product(rows, _matrices(w, "gate_up", experts).mT, routes.ends)
    del rows
    if gate_up is not None:
        gate_up.view(projected.shape).copy_(projected)
    activated = swiglu(projected, cfg.activation)
    del projected
    outputs = grouped_product(activated, _matrices(w, "down", experts).mT, routes.ends)
    del activated
    gather_sum(outputs, routes.places, routes.weights, x, out)


def experts_backward_(
    x: Tensor,
    d_stream: Tensor,
    w: Operands,
    sink: Gradients,
    cfg: DecoderConfig,
    gate_up: Tensor | None,
    balance: Balance | None,
) -> None:
    """Recompute from the input ``x`` [T, h] and turn ``d_stream`` [T, h] from dy into dx in place.

    The down projection is not recomputed: the gradient of an expert's weight, dy · (Down a), is
    taken as (Downᵀ dy) · a. ``gate_up``, if forward kept it, is overwritten. ``balance`` has
    counted all layers.
    """
    experts = _experts(cfg)
    normed, rstd = norm(x, w, "post_norm", cfg)
    routes = route(normed, w, experts)
    tokens, ends = routes.tokens, routes.ends
    rows = normed.index_select(0, tokens)
    if gate_up is None:
        gate_up = grouped_product(rows, _matrices(w, "gate_up", experts).mT, ends)
    gate_up = gate_up.view(len(rows), -1)

    d_outputs = d_stream.index_select(0, tokens)
    d_activated = grouped_product(d_outputs, _matrices(w, "down", experts), ends)
    d_weights = row_products(swiglu(gate_up, cfg.activation), d_activated)
    weights = routes.weights.flatten()[routes.order, None]
    d_outputs.mul_(weights)
    d_activated.mul_(weights)
    # Both are overwritten: the activation's gradient by the activation, gate and up by their own.
    activated = swiglu_backward(d_activated, gate_up, cfg.activation, out=d_activated)
    sink.grouped("down", d_outputs, activated, ends)
    del d_outputs, d_activated, activated
    sink.grouped("gate_up", gate_up, rows, ends)
    del rows
    d_rows = grouped_product(gate_up, _matrices(w, "gate_up", experts), ends)
    del gate_up

    d_logits = _router_backward(routes, d_weights[routes.places], experts, balance).to(x.dtype)
    sink.linear("router", d_logits, normed)
    d_normed = torch.mm(d_logits, w["router.weight"], out=normed)
    gather_sum(d_rows, routes.places, None, d_normed, d_normed)
    del d_rows
    norm_backward(
        d_normed, x, w, sink, "post_norm", cfg, rstd, residual_grad=d_stream, out=d_stream
    )


def _router_backward(
    routes: Routes, d_weights: Tensor, experts: Experts, balance: Balance | None
) -> Tensor:
    """Gradient of the router's logits, FP32 [T, E], from that of the weights [T, k]."""
    probabilities, chosen, weights = routes.probabilities, routes.chosen, routes.weights
    if experts.normalise:
        total = probabilities.gather(-1, chosen).sum(-1, keepdim=True)
        d_weights = (d_weights - (d_weights * weights).sum(-1, keepdim=True)) / total
    d_probabilities = torch.zeros_like(probabilities).scatter_(-1, chosen, d_weights)
    if balance is not None:
        d_probabilities += balance.gradient()
    inner = (d_probabilities * probabilities).sum(-1, keepdim=True)
    return probabilities * (d_probabilities - inner)


def _experts(cfg: DecoderConfig) -> Experts:
    assert cfg.experts is not None
    return cfg.experts


def _matrices(w: Operands, name: str, experts: Experts) -> Tensor:
    """An operand as one matrix per expert, [E, rows, columns]."""
    stacked = w[f"{name}.weight"]
    return stacked.view(experts.count, -1, stacked.shape[1])
