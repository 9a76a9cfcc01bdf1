"""Causal self-attention and its gradient, through PyTorch's fused kernels.

Sequences are padded on the right only, so a causal mask already hides every padded key from every
real query; no padding mask exists. A layer whose window is shorter than the sequence takes a
boolean mask instead. Rows that hold several documents take no mask: flash attention over sequences
of different lengths (Dao, 2023, arXiv 2307.08691) where there is one, elsewhere each document is
attended to by itself. Capped scores, which the fused kernels do not know, are the matter of
``softcapped.py``. Projections, norms and rotary embedding belong to the layer; determinism and the
choice of backend are PyTorch's global settings.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from slideformer.models.documents import Documents
from slideformer.models.fused_attention import Saved, fused_attention
from slideformer.models.softcapped import softcapped_attention

Mask = Tensor | Documents | None
"""What a query may see of the keys before it: where a boolean mask says so, its document, all."""


def window_mask(seq_len: int, window: int | None, device: torch.device) -> Tensor | None:
    """Boolean [seq_len, seq_len]: True where query i may see key j, 0 <= i − j < window.

    None where no mask is needed, because the window (None: unlimited) spans the sequence. Build it
    once per step and share it between the layers of one window.
    """
    if window is None or window >= seq_len:
        return None
    full = torch.ones(seq_len, seq_len, dtype=torch.bool, device=device)
    return full.tril_().triu_(1 - window)


class Scores(NamedTuple):
    """How queries and keys become attention weights: softmax(scale · q kᵀ), causal and by ``mask``.

    With ``softcap`` c the scores are c · tanh(scale · q kᵀ / c).
    """

    scale: float
    mask: Mask = None
    softcap: float | None = None

    @property
    def plain(self) -> bool:
        """Whether they are as the fused kernels make them: with neither mask nor cap."""
        return self.mask is None and self.softcap is None


def attention(
    q: Tensor, k: Tensor, v: Tensor, scores: Scores, saved: Saved | None = None
) -> Tensor:
    """Weights by ``scores`` times v, head by head.

    ``q`` is [B, S, H, D], ``k`` and ``v`` [B, S, K, D] with K a divisor of H: query heads
    i·H/K … (i+1)·H/K − 1 share key head i (grouped-query attention, Ainslie et al., 2023). Any
    strides with a contiguous last axis. Returns [B, S, H, D]. ``saved`` receives what a backward
    can go on from, where :func:`fused_attention` has a kernel and the scores are plain.
    """
    scale, mask, softcap = scores
    if saved is not None and scores.plain and (fused := fused_attention(q, k, v, scale)):
        found = fused.forward(q, k, v)
        for target, value in zip(saved, found, strict=True):
            target.copy_(value)
        return found.output
    if isinstance(mask, Documents):
        flat = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
        if softcap is None and _has_varlen(q):
            return _varlen(*flat, scale, mask).view(q.shape)
        return _one_by_one(*flat, scores, mask).view(q.shape)
    if softcap is not None:
        return softcapped_attention(q, k, v, scale=scale, softcap=softcap, mask=mask)
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


def _has_varlen(q: Tensor) -> bool:
    """Whether flash attention takes these heads; it wants multiples of 8 elements, up to 256."""
    half = q.dtype in (torch.bfloat16, torch.float16)
    return q.device.type != "cpu" and half and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256


def _varlen(q: Tensor, k: Tensor, v: Tensor, scale: float, documents: Documents) -> Tensor:
    """All documents in one kernel; ``q`` [T, H, D], ``k`` and ``v`` [T, K, D]."""
    longest, window = max(documents.lengths), documents.window
    windowed = window is not None and window < longest
    out: Tensor = torch.ops.aten._flash_attention_forward(
        q,
        k,
        v,
        documents.starts,
        documents.starts,
        longest,
        longest,
        0.0,  # dropout
        not windowed,  # causal; a window's right edge of 0 says the same
        False,
        scale=scale,
        window_size_left=window - 1 if windowed and window is not None else None,
        window_size_right=0 if windowed else None,
    )[0]
    return out


def _one_by_one(q: Tensor, k: Tensor, v: Tensor, scores: Scores, documents: Documents) -> Tensor:
    """The same, one document after another."""
    qs, ks, vs = (t.unsqueeze(0).split(documents.lengths, dim=1) for t in (q, k, v))
    outputs = []
    for number, length in enumerate(documents.lengths):
        own = scores._replace(mask=window_mask(length, documents.window, q.device))
        outputs.append(attention(qs[number], ks[number], vs[number], own))
    return torch.cat(outputs, dim=1)[0]


class RecordedAttention:
    """One attention forward, kept for its backward: the only autograd graph in a decoder layer.

    A fused kernel without a mask needs no graph, and no forward either if it is ``saved``. Holds
    the inputs, the output and what the kernel saved; drop the object to free them.
    """

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, scores: Scores, saved: Saved | None = None
    ) -> None:
        """Runs :func:`attention` on the same arguments; do not write to them before backward."""
        self._inputs = q, k, v
        self._fused = fused_attention(q, k, v, scores.scale) if scores.plain else None
        if self._fused is not None:
            self._saved = self._fused.forward(q, k, v) if saved is None else saved
            self._output = self._saved.output
            return
        with torch.enable_grad():
            # .data has a version of its own: other parts of the memory that these are views of are
            # overwritten before backward, and autograd would take that for a change of these.
            q, k, v = (t.data.requires_grad_() for t in (q, k, v))
            mask = scores.mask
            if isinstance(mask, Documents):
                mask = mask._replace(starts=mask.starts.data)
            elif mask is not None:
                mask = mask.data
            self._inputs = q, k, v
            self._output = attention(q, k, v, scores._replace(mask=mask))

    @property
    def output(self) -> Tensor:
        """What :func:`attention` returned, [B, S, H, D]."""
        return self._output.detach()

    def backward(self, d_output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v in their shapes, given that of the output; callable once."""
        if self._fused is not None:
            q, k, v = self._inputs
            return self._fused.backward(d_output, q, k, v, self._saved)
        dq, dk, dv = torch.autograd.grad(self._output, self._inputs, d_output)
        return dq, dk, dv
