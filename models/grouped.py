"""Matrix products of rows that are sorted into groups, each group with a matrix of its own.

On a GPU in BF16 one kernel does all groups and the host waits for nothing. Elsewhere the groups are
multiplied one after another, which asks the device for their sizes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from slideformer.models.gradients import product_, store_

PIECE = 2**26
"""Elements of a weight gradient that exist beside their destination at once on a GPU."""


def grouped_product(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """rows · M for each row's own matrix M: [R, n].

    ``rows`` [R, m] are sorted by group, group g ends before row ``ends[g]`` (int32 [G], ascending,
    the last one R) and has ``matrices[g]`` of [G, m, n]; BF16 or FP32. On a GPU in BF16 m and n
    must be divisible by 8.
    """
    if _one_kernel(rows):
        return F.grouped_mm(rows, matrices, offs=ends)
    out = rows.new_empty(len(rows), matrices.shape[2])
    for group, part in _groups(ends):
        torch.mm(rows[part], matrices[group], out=out[part])
    return out


def grouped_gradient_(
    out: Tensor, left: Tensor, right: Tensor, ends: Tensor, *, accumulate: bool
) -> None:
    """out[g] = leftᵀ · right over the rows of group g, or added to it with ``accumulate``.

    ``left`` [R, n] and ``right`` [R, m] are grouped as in :func:`grouped_product`; ``out``
    [G, n, m], contiguous, is in their dtype or in FP32, and FP32 when accumulating. A group without
    rows has a gradient of zero. On a GPU in BF16 a sum over rows is rounded to BF16 before it is
    added.
    """
    if not _one_kernel(left):
        for group, part in _groups(ends):
            product_(out[group], left[part].T, right[part], accumulate=accumulate)
        return
    empty = torch.diff(ends, prepend=ends.new_zeros(1)) == 0
    groups, height, width = out.shape
    step = max(8, PIECE // (groups * width) // 8 * 8)
    for start in range(0, height, step):
        rows = slice(start, min(start + step, height))
        piece = F.grouped_mm(left[:, rows].T, right, offs=ends)
        piece.masked_fill_(empty[:, None, None], 0.0)  # the kernel leaves them as they were
        store_(out[:, rows], piece, accumulate=accumulate)


def grouped_piece_bytes(groups: int, height: int, width: int, dtype_bytes: int) -> int:
    """Bytes of the temporary in :func:`grouped_gradient_` on a GPU in BF16."""
    step = max(8, PIECE // (groups * width) // 8 * 8)
    return groups * min(step, height) * width * dtype_bytes


def _one_kernel(rows: Tensor) -> bool:
    return rows.is_cuda and rows.dtype is torch.bfloat16


def _groups(ends: Tensor) -> Iterator[tuple[int, slice]]:
    """Each group and its rows."""
    start = 0
    for group, end in enumerate(ends.tolist()):
        yield group, slice(start, end)
        start = end
