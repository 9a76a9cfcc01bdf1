"""Triton kernel of ``squares.py``; importing it imports Triton. Bound by memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slideformer.kernels.triton_jit import jit

_BLOCK = 4096


@jit
def _kernel(x: tl.tensor, shares: tl.tensor, n: tl.tensor, BLOCK: tl.constexpr) -> None:
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    wide = tl.load(x + at, mask=at < n, other=0.0).to(tl.float64)
    tl.store(shares + tl.program_id(0), tl.sum(wide * wide))


def launch(x: Tensor, out: Tensor) -> None:
    """Arguments as :func:`slideformer.kernels.squares.sum_of_squares`'s; 8 bytes per block."""
    blocks = triton.cdiv(x.numel(), _BLOCK)
    shares = torch.empty(blocks, dtype=torch.float64, device=x.device)
    _kernel[(blocks,)](x, shares, x.numel(), BLOCK=_BLOCK, num_warps=8)
    torch.sum(shares, 0, out=out)
