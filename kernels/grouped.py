"""Matrix products of rows that are sorted into groups, each group with a matrix of its own.

Rows of group g end before row ``ends[g]`` (int32 ``[G]``, ascending, the last one the number of
rows); a group may be empty. In BF16 on a GPU one kernel does all groups, and the host waits for
nothing; elsewhere :func:`grouped_product` multiplies group after group.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from slideformer.kernels import reference
from slideformer.kernels.triton_support import triton_enabled


def grouped_product(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """Each row of ``rows`` ``[R, m]`` times its group's of ``matrices`` ``[G, m, n]``: ``[R, n]``.

    bf16 or fp32. On a GPU in bf16 m and n must be divisible by 8.
    """
    if rows.is_cuda and rows.dtype is torch.bfloat16:
        return F.grouped_mm(rows, matrices, offs=ends)
    return reference.grouped_product(rows, matrices, ends)


def grouped_gradient_(
    out: Tensor, left: Tensor, right: Tensor, ends: Tensor, *, accumulate: bool
) -> None:
    """``out[g] = left.T @ right`` over the rows of group g, or added to it with ``accumulate``.

    ``left`` is ``[R, n]``, ``right`` ``[R, m]``, both bf16 or fp32 and contiguous, ``out``
    ``[G, n, m]``, contiguous, in their dtype or fp32, which it must be to accumulate. Sums are
    fp32, in an order that depends on the shapes alone, and rounded once. An empty group gives zero.
    Raises ``ValueError`` if the shapes do not fit.
    """
    if out.shape != (len(ends), left.shape[1], right.shape[1]) or len(left) != len(right):
        raise ValueError(
            f"grouped_gradient_ got out {tuple(out.shape)} for {len(ends)} groups of left "
            f"{tuple(left.shape)} and right {tuple(right.shape)}: they must be [groups, n, m], "
            "[rows, n] and [rows, m]"
        )
    if not (out.is_contiguous() and left.is_contiguous() and right.is_contiguous()):
        raise ValueError("grouped_gradient_ got tensors that are not contiguous")
    if accumulate and out.dtype is not torch.float32:
        raise ValueError(f"grouped_gradient_ adds up in float32 only, got {out.dtype}")
    if triton_enabled(left):
        from slideformer.kernels import grouped_triton

        grouped_triton.grouped_gradient_(out, left, right, ends, accumulate)
    else:
        reference.grouped_gradient_(out, left, right, ends, accumulate)
