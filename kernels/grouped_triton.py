"""Triton kernel of ``grouped.py``, which has the formula. Importing it imports Triton.

A program makes one tile of one group's matrix and walks over that group's rows, so groups of any
size, and empty ones, need no help from the host.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from slideformer.kernels.triton_jit import jit

_ROWS, _TILE = 64, 128  # rows multiplied at once; height and width of a program's tile


@jit
def _gradient_kernel(
    left: tl.tensor,
    right: tl.tensor,
    ends: tl.tensor,
    gradient: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    ACCUMULATE: tl.constexpr,
    WIDEN: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    across, down = tl.cdiv(width, TILE), tl.cdiv(height, TILE)
    group = tl.program_id(0) // (across * down)
    i = tl.program_id(0) % (across * down) // across * TILE + tl.arange(0, TILE)
    j = tl.program_id(0) % across * TILE + tl.arange(0, TILE)
    start = tl.load(ends + group - 1, mask=group > 0, other=0)
    stop = tl.load(ends + group)
    total = tl.zeros([TILE, TILE], tl.float32)
    for first in range(start, stop, ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        inside = row < stop
        at = left + row * height + i[None, :]
        one = tl.load(at, mask=inside & (i < height)[None, :], other=0.0)
        at = right + row * width + j[None, :]
        other = tl.load(at, mask=inside & (j < width)[None, :], other=0.0)
        if WIDEN:
            one, other = one.to(tl.float32), other.to(tl.float32)
        total = tl.dot(tl.trans(one), other, total, input_precision="ieee")
    at = gradient + (group.to(tl.int64) * height + i[:, None]) * width + j[None, :]
    mask = (i < height)[:, None] & (j < width)[None, :]
    if ACCUMULATE:
        total += tl.load(at, mask=mask, other=0.0)
    tl.store(at, total.to(gradient.dtype.element_ty), mask=mask)


def grouped_gradient_(
    out: Tensor, left: Tensor, right: Tensor, ends: Tensor, accumulate: bool
) -> None:
    """See :func:`slideformer.kernels.grouped.grouped_gradient_`."""
    groups, height, width = out.shape
    tiles = triton.cdiv(height, _TILE) * triton.cdiv(width, _TILE)
    _gradient_kernel[(groups * tiles,)](
        left,
        right,
        ends,
        out,
        height,
        width,
        ACCUMULATE=accumulate,
        WIDEN=not left.is_cuda,  # the interpreter takes bf16 for integers in products
        ROWS=_ROWS,
        TILE=_TILE,
        num_warps=8,
        num_stages=3,
    )
