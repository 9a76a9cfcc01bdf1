"""Triton kernel of ``rope.py``, which has the formula. Importing it imports Triton.

A program rotates a group of heads of one token, so the token's angles are read once for the group.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from slideformer.kernels.triton_jit import jit

_TILE = 2048  # elements of a program: four warps with one 16-byte access in each half


@jit
def _rope_kernel(
    x: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    sequence: tl.tensor,
    heads: tl.tensor,
    half: tl.tensor,
    x_batch: tl.tensor,
    x_token: tl.tensor,
    x_head: tl.tensor,
    cos_batch: tl.tensor,
    cos_token: tl.tensor,
    sin_batch: tl.tensor,
    sin_token: tl.tensor,
    INVERSE: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
) -> None:
    groups = tl.cdiv(heads, HEADS)
    token = tl.program_id(0) // groups
    batch = (token // sequence).to(tl.int64)
    position = (token % sequence).to(tl.int64)
    head = tl.program_id(0) % groups * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, HALF)
    in_half = column < half

    cos_at = cos + batch * cos_batch + position * cos_token + column
    sin_at = sin + batch * sin_batch + position * sin_token + column
    c = tl.load(cos_at, mask=in_half, other=0.0)[None, :]
    s = tl.load(sin_at, mask=in_half, other=0.0)[None, :]
    if INVERSE:
        s = -s

    at = x + batch * x_batch + position * x_token + head.to(tl.int64)[:, None] * x_head + column
    mask = (head < heads)[:, None] & in_half[None, :]
    first = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(at + half, mask=mask, other=0.0).to(tl.float32)
    dtype: tl.constexpr = x.dtype.element_ty
    tl.store(at, (first * c - second * s).to(dtype), mask=mask)
    tl.store(at + half, (second * c + first * s).to(dtype), mask=mask)


def rope_(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    """See :func:`slideformer.kernels.rope.rope_`."""
    batch, sequence, heads, size = x.shape
    half_block = triton.next_power_of_2(size // 2)
    group = min(triton.next_power_of_2(heads), max(1, _TILE // 2 // half_block))
    _rope_kernel[(batch * sequence * triton.cdiv(heads, group),)](
        x,
        cos,
        sin,
        sequence,
        heads,
        size // 2,
        *x.stride()[:3],
        *_table_strides(cos),
        *_table_strides(sin),
        INVERSE=inverse,
        HEADS=group,
        HALF=half_block,
        num_warps=4,
    )
    return x


def _table_strides(table: Tensor) -> tuple[int, int]:
    """Batch and token stride; a table without a batch, or of one, serves every batch element."""
    if table.ndim == 2 or table.shape[0] == 1:
        return 0, table.stride(-2)
    return table.stride(0), table.stride(1)
