"""Triton kernels of ``routed.py``, which has the formulas. Importing it imports Triton.

A program makes a piece of a token's row, or all of one product, and reads every input once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slideformer.kernels.triton_jit import jit

_BLOCK = 1024  # columns of a program: four warps with one 16-byte access to each tensor


@jit
def _gather_sum_kernel(
    values: tl.tensor,
    places: tl.tensor,
    weights: tl.tensor | None,
    residual: tl.tensor,
    out: tl.tensor,
    width: tl.tensor,
    EACH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    pieces = tl.cdiv(width, BLOCK)
    token = (tl.program_id(0) // pieces).to(tl.int64)
    column = tl.program_id(0) % pieces * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    total = tl.load(residual + token * width + column, mask=mask, other=0.0).to(tl.float32)
    for j in range(EACH):
        row = tl.load(places + token * EACH + j)
        value = tl.load(values + row * width + column, mask=mask, other=0.0).to(tl.float32)
        if weights is not None:
            value *= tl.load(weights + token * EACH + j)
        total += value
    tl.store(out + token * width + column, total.to(out.dtype.element_ty), mask=mask)


@jit
def _row_products_kernel(
    left: tl.tensor, right: tl.tensor, products: tl.tensor, width: tl.tensor, BLOCK: tl.constexpr
) -> None:
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = column < width
        one = tl.load(left + row * width + column, mask=mask, other=0.0).to(tl.float32)
        other = tl.load(right + row * width + column, mask=mask, other=0.0).to(tl.float32)
        total += one * other
    tl.store(products + row, tl.sum(total, 0))


def gather_sum(
    rows: Tensor, places: Tensor, weights: Tensor | None, residual: Tensor, out: Tensor
) -> None:
    """See :func:`slideformer.kernels.routed.gather_sum`."""
    tokens, width = out.shape
    _gather_sum_kernel[(tokens * triton.cdiv(width, _BLOCK),)](
        rows,
        places,
        weights,
        residual,
        out,
        width,
        EACH=places.shape[1],
        BLOCK=_BLOCK,
        num_warps=4,
    )


def row_products(left: Tensor, right: Tensor) -> Tensor:
    """See :func:`slideformer.kernels.routed.row_products`."""
    rows, width = left.shape
    out = torch.empty(rows, dtype=torch.float32, device=left.device)
    _row_products_kernel[(rows,)](left, right, out, width, BLOCK=_BLOCK, num_warps=4)
    return out
