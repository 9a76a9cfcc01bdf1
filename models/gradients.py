"""Products and sums that land in a given gradient buffer, overwriting it or adding to it.

A gradient buffer has the compute dtype when the step has one micro-batch, and FP32 when several
contributions are summed in it: adding in BF16 would round every partial sum. Nothing here knows
what the operands mean.
"""

from __future__ import annotations

import torch
from torch import Tensor


def product_(out: Tensor, left: Tensor, right: Tensor, *, accumulate: bool) -> None:
    """``out = left @ right``, or ``out += left @ right`` with ``accumulate``.

    ``left`` is [m, k] and ``right`` [k, n], both BF16 or both FP32, in any stride order; ``out`` is
    [m, n], contiguous, in their dtype or in FP32, and FP32 when accumulating. The product is
    summed in FP32 and rounded once, to the dtype of ``out``.
    """
    assert not accumulate or out.dtype is torch.float32, "partial sums belong in FP32"
    if out.dtype is left.dtype:
        if accumulate:
            torch.addmm(out, left, right, out=out)
        else:
            torch.mm(left, right, out=out)
    elif left.is_cuda:
        # One BF16 product with an FP32 epilogue: no temporary and no separate pass over `out`.
        if accumulate:
            torch.addmm(out, left, right, out_dtype=torch.float32, out=out)
        else:
            torch.mm(left, right, out_dtype=torch.float32, out=out)
    else:
        # CPU products have no mixed form. Every product of two BF16 numbers is exact in FP32.
        product_(out, left.float(), right.float(), accumulate=accumulate)


def store_(out: Tensor, value: Tensor, *, accumulate: bool) -> None:
    """``out = value``, or ``out += value`` with ``accumulate``; the FP32 value is rounded once."""
    assert not accumulate or out.dtype is torch.float32, "partial sums belong in FP32"
    if accumulate:
        out.add_(value)
    else:
        out.copy_(value)
