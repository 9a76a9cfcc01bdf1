"""Causal self-attention with soft-capped scores (Gemma 2), and its gradient.

    softmax(c · tanh(scale · q kᵀ / c) + mask) v

The fused kernels of PyTorch do not cap scores, so these are made here, a block of queries at a
time: one block's scores exist at once, whatever the length, and backward makes them again. Products
are those of the compute dtype, summed in FP32; everything between them is FP32. The order of all
sums is fixed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slideformer.models.workspace import BLOCK_SCORES


def softcapped_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, softcap: float, mask: Tensor | None
) -> Tensor:
    """Attention of ``q`` [B, S, H, D] over ``k`` and ``v`` [B, S, K, D]; returns [B, S, H, D].

    K divides H, and query heads i·H/K … share key head i. ``mask`` is boolean [S, S], True where a
    query sees a key, or None for plain causal attention. Differentiable by autograd.
    """
    out: Tensor = _Softcapped.apply(  # type: ignore[no-untyped-call]
        q, k, v, scale, softcap, mask
    )
    return out


class _Block(NamedTuple):
    """Some queries of one sequence, and what they may see."""

    row: int
    queries: slice
    keys: slice
    hidden: Tensor
    """Boolean [queries, keys]: what a query does not see."""


class _Softcapped(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        softcap: float,
        mask: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.settings = scale, softcap, mask
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for block in _blocks(q, mask):
            _, weights = _weights(q, k, block, scale, softcap)
            values = v[block.row, block.keys].transpose(0, 1)
            part = torch.bmm(weights.to(q.dtype), values)
            out[block.row, block.queries] = _ungrouped(part, q.shape[2])
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        scale, softcap, mask = ctx.settings
        dq = torch.empty_like(q, memory_format=torch.contiguous_format)
        dk, dv = (torch.zeros(t.shape, dtype=torch.float32, device=t.device) for t in (k, v))
        for block in _blocks(q, mask):
            tanh, weights = _weights(q, k, block, scale, softcap)
            keys, values = (t[block.row, block.keys].transpose(0, 1) for t in (k, v))
            d_part = _grouped(d_out, block, k.shape[2])
            dv[block.row, block.keys] += _product(weights.to(q.dtype).mT, d_part).transpose(0, 1)
            d_scores = _product(d_part, values.mT)
            d_scores -= (d_scores * weights).sum(-1, keepdim=True)
            d_scores *= weights
            d_scores *= tanh.square_().neg_().add_(1).mul_(scale)
            rounded = d_scores.to(q.dtype)
            dq[block.row, block.queries] = _ungrouped(torch.bmm(rounded, keys), q.shape[2])
            queries = _grouped(q, block, k.shape[2])
            dk[block.row, block.keys] += _product(rounded.mT, queries).transpose(0, 1)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None, None


def _blocks(q: Tensor, mask: Tensor | None) -> Iterator[_Block]:
    """All queries, block by block; no block sees keys behind its last query."""
    batch, seq_len, heads, _ = q.shape
    size = max(1, min(seq_len, BLOCK_SCORES // (heads * seq_len)))
    for start in range(0, seq_len, size):
        stop = min(start + size, seq_len)
        if mask is None:
            visible = torch.ones(stop - start, stop, dtype=torch.bool, device=q.device).tril_(start)
        else:
            visible = mask[start:stop, :stop]
        for row in range(batch):
            yield _Block(row, slice(start, stop), slice(0, stop), ~visible)


def _weights(
    q: Tensor, k: Tensor, block: _Block, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """Hyperbolic tangents and attention weights of a block, FP32 [K, queries · H/K, keys] each."""
    queries, keys = _grouped(q, block, k.shape[2]), k[block.row, block.keys].transpose(0, 1)
    tanh = _product(queries, keys.mT).mul_(scale / softcap).tanh_()
    scores = tanh * softcap
    scores.view(len(scores), -1, *block.hidden.shape).masked_fill_(block.hidden, float("-inf"))
    return tanh, torch.softmax(scores, dim=-1)


def _grouped(x: Tensor, block: _Block, kv_heads: int) -> Tensor:
    """A block's rows of ``x`` [B, S, H, D] by the key head they share: [K, H/K · queries, D]."""
    part = x[block.row, block.queries]
    part = part.view(len(part), kv_heads, -1, part.shape[-1])
    return part.permute(1, 2, 0, 3).flatten(1, 2)


def _ungrouped(x: Tensor, heads: int) -> Tensor:
    """Undo `_grouped`: [queries, H, D]."""
    groups = heads // x.shape[0]
    return x.view(len(x), groups, -1, x.shape[-1]).permute(2, 0, 1, 3).flatten(1, 2)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Batched product in FP32; every product of two BF16 numbers is exact in it."""
    if left.dtype is torch.float32:
        return torch.bmm(left, right)
    if left.is_cuda:
        return torch.bmm(left, right, out_dtype=torch.float32)
    return torch.bmm(left.float(), right.float())
