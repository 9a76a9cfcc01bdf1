"""The arithmetic of one decoder layer, forward and backward, over weights that lie in a slot.

    middle = x + O · attention(rope(norm(QKV · rms_norm(x))))
    y = middle + Down · swiglu(GateUp · rms_norm(middle))

This is the pre-norm layer of Llama, Qwen2, Qwen3, Mistral and Phi-3; biases and the head norms of
queries and keys are optional, and so are norms of what O and Down give, as in Gemma; experts may
take the MLP's place (``mlp.py``, ``experts.py``), as in Mixtral and Qwen3-MoE. Weights come
as a mapping from operand name to a view of a slot, and gradients go to views of another. Backward
needs nothing but the layer's input: it computes the rest again, unless forward kept it, and frees
each temporary as soon as its last reader is done. There is no module and, outside attention, no
autograd graph; call under ``torch.no_grad()``. Nothing here waits for the device, moves weights, or
knows which layer it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slideformer.kernels.rope import rope_
from slideformer.models.attention import Mask, RecordedAttention, Scores, attention
from slideformer.models.balance import Balance
from slideformer.models.decoder import DecoderConfig
from slideformer.models.experts import experts_backward_, experts_forward
from slideformer.models.layer_memory import Kept
from slideformer.models.low_rank import adapters_of
from slideformer.models.mlp import mlp_backward_, mlp_forward
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

Rope = tuple[Tensor, Tensor]
"""Cosines and sines of the rotary embedding, each FP32 [S, R] or [B, S, R], R = ``rotary_dim``."""


def forward(
    x: Tensor,
    w: Operands,
    cfg: DecoderConfig,
    rope: Rope,
    *,
    mask: Mask = None,
    out: Tensor | None = None,
    kept: Kept | None = None,
    tile: int | None = None,
    balance: Balance | None = None,
) -> Tensor:
    """The layer's output [B, S, h] for input ``x`` [B, S, h], BF16 or FP32, contiguous.

    ``w`` holds, in the dtype of ``x``: ``input_norm.weight`` and ``post_norm.weight`` [h],
    ``qkv.weight`` [(H+2K)·D, h], ``o.weight`` [h, H·D], ``gate_up.weight`` [2I, h] (gate rows
    first), ``down.weight`` [h, I]; where the configuration has them ``q_norm.weight`` and
    ``k_norm.weight`` [D], ``o_norm.weight`` and ``down_norm.weight`` [h], and the biases
    ``qkv.bias``, ``o.bias``, ``gate_up.bias``, ``down.bias``. ``mask`` is that of
    :class:`slideformer.models.attention.Scores`. ``out``, contiguous and distinct from ``x``,
    receives the result. A layer with experts has the operands of ``experts.py`` in place of
    ``gate_up`` and ``down``. ``kept`` receives what :func:`backward` can use instead of computing
    it again. The MLP takes ``tile`` tokens at a time, or all at once. ``balance`` counts the load
    of experts, where a loss balances it.
    """
    if out is None:
        out = torch.empty_like(x)
    tokens, stream = x.view(-1, cfg.hidden), out.view(-1, cfg.hidden)
    normed, _ = norm(tokens, w, "input_norm", cfg)
    heads = _heads(normed, w, cfg, x, kept)
    del normed
    # Backward asks for the inputs of the heads' norms.
    q, k, v, _ = _rotated(heads, w, cfg, rope, in_place=kept is None or not cfg.qk_norm)
    saved = kept.attention if kept is not None else None
    attended = attention(q, k, v, Scores(cfg.scale, mask, cfg.softcap), saved)
    del heads, q, k, v
    middle = stream if kept is None else kept.middle
    residual_linear(tokens, attended.reshape(len(tokens), -1), w, "o", cfg, out=middle)
    del attended
    for part in _tiles(len(tokens), tile):
        gate_up = kept.gate_up[part] if kept is not None else None
        if cfg.experts is None:
            mlp_forward(middle[part], w, cfg, gate_up, out=stream[part])
        else:
            load = balance.part(part) if balance is not None else None
            experts_forward(middle[part], w, cfg, gate_up, load, out=stream[part])
    return out


def backward(
    x: Tensor,
    dy: Tensor,
    w: Operands,
    grads: Operands,
    cfg: DecoderConfig,
    rope: Rope,
    *,
    accumulate: bool,
    mask: Mask = None,
    kept: Kept | None = None,
    tile: int | None = None,
    balance: Balance | None = None,
) -> None:
    """From the gradient of the output to those of the input and of every operand.

    ``x``, ``w``, ``rope`` and ``mask`` are those of :func:`forward`. ``dy`` [B, S, h] is
    overwritten with the gradient of ``x``. ``grads`` has the names and shapes of ``w``, in the
    dtype of ``x`` or in FP32; it is overwritten, or with ``accumulate`` added to (FP32 only). An
    operand that it lacks is frozen; of `AdaptedOperands` it has the adapters alone. ``kept``, if
    forward filled it, is overwritten too. ``tile`` is that of :func:`forward`; if it makes several
    tiles, ``grads`` are FP32.
    """
    tokens, d_stream = x.view(-1, cfg.hidden), dy.view(-1, cfg.hidden)
    sink = Gradients(grads, accumulate, adapters_of(w))

    normed, rstd = norm(tokens, w, "input_norm", cfg)
    heads = _heads(normed, w, cfg, x, None) if kept is None else kept.heads
    if kept is None or cfg.qk_norm:
        q, k, v, head_rstd = _rotated(heads, w, cfg, rope, in_place=False)
    else:
        q, k, v = heads.split([cfg.heads, cfg.kv_heads, cfg.kv_heads], dim=2)
        head_rstd = None
    saved = kept.attention if kept is not None else None
    recorded = RecordedAttention(q, k, v, Scores(cfg.scale, mask, cfg.softcap), saved)
    del q, k, v, saved
    attended = recorded.output.reshape(len(tokens), -1)
    if kept is None:
        middle = torch.empty_like(tokens)
        residual_linear(tokens, attended, w, "o", cfg, out=middle)
    else:
        middle = kept.middle

    for part in _tiles(len(tokens), tile):
        partial = sink._replace(accumulate=accumulate or part.start > 0)
        gate_up = kept.gate_up[part] if kept is not None else None
        if cfg.experts is None:
            mlp_backward_(middle[part], d_stream[part], w, partial, cfg, gate_up)
        else:
            load = balance.part(part) if balance is not None else None
            experts_backward_(middle[part], d_stream[part], w, partial, cfg, gate_up, load)
    del middle, gate_up

    d_out = d_stream
    if cfg.output_norms:
        d_out = output_norm_backward(d_stream, attended, w, sink, "o", cfg)
    sink.linear("o", d_out, attended)
    d_attended = input_gradient(d_out, w, "o").view(recorded.output.shape)
    del d_out
    dq, dk, dv = recorded.backward(d_attended)
    del recorded, attended, d_attended
    _heads_backward(heads, (dq, dk, dv), w, sink, cfg, rope, head_rstd)
    del dq, dk, dv
    d_heads = heads.view(len(tokens), -1)
    sink.linear("qkv", d_heads, normed)
    d_normed = input_gradient(d_heads, w, "qkv", out=normed)
    norm_backward(
        d_normed, tokens, w, sink, "input_norm", cfg, rstd, residual_grad=d_stream, out=d_stream
    )


def _tiles(tokens: int, tile: int | None) -> list[slice]:
    """``[0, tokens)`` in parts of ``tile``; all of it is one part if that is None."""
    size = tile or tokens
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def _heads(normed: Tensor, w: Operands, cfg: DecoderConfig, x: Tensor, kept: Kept | None) -> Tensor:
    """Projections [B, S, H+2K, D] of the layer's input ``x`` after its norm."""
    if kept is None:
        return linear(normed, w, "qkv").view(*x.shape[:2], -1, cfg.head_dim)
    linear(normed, w, "qkv", out=kept.heads.view(len(normed), -1))
    return kept.heads


def _rotated(
    heads: Tensor, w: Operands, cfg: DecoderConfig, rope: Rope, *, in_place: bool
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """Queries, keys and values [B, S, heads, D] ready for attention, and the head norms' rstd.

    ``heads`` [B, S, H+2K, D] holds the projections. Rotation works in place; the head norms write
    in place too, unless the backward pass will ask for their inputs.
    """
    n_q, n_qk = cfg.heads, cfg.heads + cfg.kv_heads
    qk, rstd = heads[:, :, :n_qk], None
    if cfg.qk_norm:
        normed = qk if in_place else torch.empty(qk.shape, dtype=qk.dtype, device=qk.device)
        _, q_rstd = norm(qk[:, :, :n_q], w, "q_norm", cfg, out=normed[:, :, :n_q])
        _, k_rstd = norm(qk[:, :, n_q:], w, "k_norm", cfg, out=normed[:, :, n_q:])
        qk, rstd = normed, (q_rstd, k_rstd)
    rope_(qk[..., : cfg.rotary_dim], *rope)
    return qk[:, :, :n_q], qk[:, :, n_q:], heads[:, :, n_qk:], rstd


def _heads_backward(
    heads: Tensor,
    d_rotated: tuple[Tensor, Tensor, Tensor],
    w: Operands,
    sink: Gradients,
    cfg: DecoderConfig,
    rope: Rope,
    rstd: tuple[Tensor, Tensor] | None,
) -> None:
    """Undo :func:`_rotated` for gradients: overwrite ``heads`` with the projections' gradient.

    The gradient of a rotation is its transpose.
    """
    dq, dk, dv = d_rotated
    n_q, n_qk = cfg.heads, cfg.heads + cfg.kv_heads
    if rstd is None:
        torch.cat((dq, dk, dv), dim=2, out=heads)
        rope_(heads[:, :, :n_qk, : cfg.rotary_dim], *rope, inverse=True)
        return
    q, k = heads[:, :, :n_q], heads[:, :, n_q:n_qk]
    dq, dk = dq.contiguous(), dk.contiguous()  # as they are, from the fused kernels
    rope_(dq[..., : cfg.rotary_dim], *rope, inverse=True)
    rope_(dk[..., : cfg.rotary_dim], *rope, inverse=True)
    # Each row of the buffer is read as a query or key before its norm, then takes its gradient.
    norm_backward(dq, q, w, sink, "q_norm", cfg, rstd[0], out=q)
    norm_backward(dk, k, w, sink, "k_norm", cfg, rstd[1], out=k)
    heads[:, :, n_qk:].copy_(dv)
