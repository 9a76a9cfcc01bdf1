"""Causal self-attention and its gradient, through PyTorch's fused scaled-dot-product attention.

Sequences are padded on the right only, so a causal mask already hides every padded key from every
real query; no padding mask exists. A layer whose window is shorter than the sequence takes a
boolean mask instead. Projections, norms and rotary embedding belong to the layer; determinism and
the choice of backend are PyTorch's global settings.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def window_mask(seq_len: int, window: int | None, device: torch.device) -> Tensor | None:
    """Boolean [seq_len, seq_len]: True where query i may see key j, 0 <= i − j < window.

    None where no mask is needed, because the window (None: unlimited) spans the sequence. Build it
    once per step and share it between the layers of one window.
    """
    if window is None or window >= seq_len:
        return None
    full = torch.ones(seq_len, seq_len, dtype=torch.bool, device=device)
    return full.tril_().triu_(1 - window)


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None) -> Tensor:
    """softmax(scale · q kᵀ + causal or window mask) v, head by head.

    ``q`` is [B, S, H, D], ``k`` and ``v`` [B, S, K, D] with K a divisor of H: query heads
    i·H/K … (i+1)·H/K − 1 share key head i (grouped-query attention, Ainslie et al., 2023). Any
    strides with a contiguous last axis. Returns [B, S, H, D].
    """
    groups = q.shape[2] // k.shape[2]
    # On CUDA only the half-precision kernels without a mask read shared heads in place; the others
    # would fall back to one that materialises all scores.
    shared = mask is None and not (q.is_cuda and q.dtype is torch.float32)
    if groups > 1 and not shared:
        k = k.unsqueeze(3).expand(-1, -1, -1, groups, -1).flatten(2, 3)
        v = v.unsqueeze(3).expand(-1, -1, -1, groups, -1).flatten(2, 3)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=groups > 1 and shared,
    )
    return out.transpose(1, 2)


class RecordedAttention:
    """One attention forward, kept for its backward: the only autograd graph in a decoder layer.

    Holds the inputs, the output and what the kernel saved; drop the object to free them.
    """

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None
    ) -> None:
        """Runs :func:`attention` on the same arguments; do not write to them before backward."""
        with torch.enable_grad():
            self._inputs = tuple(t.detach().requires_grad_() for t in (q, k, v))
            self._output = attention(*self._inputs, scale=scale, mask=mask)

    @property
    def output(self) -> Tensor:
        """What :func:`attention` returned, [B, S, H, D]."""
        return self._output.detach()

    def backward(self, d_output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v in their shapes, given that of the output; callable once."""
        dq, dk, dv = torch.autograd.grad(self._output, self._inputs, d_output)
        return dq, dk, dv
