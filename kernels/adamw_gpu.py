"""AdamW and Lion on the GPU for units whose split FP32 masters and moments stay there.

The same update as ``adamw.adamw_update`` and ``adamw.adamw_rows``, with the same bits for every
finite input: the order of operations at the head of ``adamw.cpp``, each rounded once, subnormals
kept. The state of ``n`` parameters is four contiguous 1-D CUDA tensors, ``hi`` and ``lo`` int16 and
``m`` and ``v`` float32; gradients are bfloat16 or float32. Work is queued on the current stream and
the host never waits, so what only the GPU knows (norms, row numbers) is not checked by the host.

Serves no CPU tensors. Decides nothing about when to update or how to scale gradients, and does not
schedule learning rates.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from slideformer.kernels.adamw import AdamW, Lion, Segment
from slideformer.kernels.adamw_checks import GRADIENTS, check_beside, check_segments
from slideformer.kernels.adamw_library import all_constants
from slideformer.kernels.triton_support import triton_enabled


def adamw_update_gpu(
    hi: Tensor,
    lo: Tensor,
    m: Tensor,
    v: Tensor,
    grad: Tensor,
    norm: Tensor,
    segments: Sequence[Segment],
    hyper: AdamW,
) -> None:
    """Update the elements that ``segments`` list, in place, if ``norm`` is finite; else nothing.

    Launches one kernel per segment. It is fastest where the tensors begin at 16-byte boundaries;
    segments may begin anywhere.

    Args:
        hi, lo: int16[n]: the master weights.
        m, v: float32[n]: the moments.
        grad: bfloat16[n] or float32[n].
        norm: float32 or float64, one element: whatever tells if the gradient is finite.
        segments: Ascending, disjoint, within ``[0, n)``. They carry the learning rates and weight
            decays; those of ``hyper`` are not used.
        hyper: Betas, eps, step and the factor of all gradients.

    Raises:
        TypeError: A tensor has another dtype.
        ValueError: A tensor is not on the GPU of ``hi``, strided or of another size; segments
            overlap or leave the range.
    """
    n = hi.numel()
    state = _check_state(hi, lo, m, v, hyper)
    check_beside("grad", grad, GRADIENTS, (n,), hi)
    check_beside("norm", norm.reshape(-1), (torch.float32, torch.float64), (1,), hi)
    check_segments(segments, n)
    from slideformer.kernels import adamw_triton

    for segment in segments:
        if segment.begin < segment.end:
            constants = all_constants(segment.lr, segment.weight_decay, hyper)
            adamw_triton.update_range(state, grad, norm, segment.begin, segment.end, constants)


def adamw_rows_gpu(
    hi: Tensor,
    lo: Tensor,
    m: Tensor,
    v: Tensor,
    counts: Tensor,
    rows: Tensor,
    starts: Tensor,
    order: Tensor,
    dx: Tensor,
    dense_grad: Tensor | None,
    squares: Tensor,
    hyper: AdamW,
) -> None:
    """Update rows of a matrix [V, h] in place, each with the gradient rows that belong to it.

    The gradient of row ``rows[u]``, for ``u`` below U, is its row of ``dense_grad`` (zero without
    one) plus the rows ``order[k]`` of ``dx`` for ``starts[u] <= k < starts[u + 1]``, added in FP32
    in this order. A row whose gradient is not finite stays as it is, unlike in
    ``adamw.adamw_rows``, which then writes no row at all. Allocates 8 bytes per row and 512 columns
    while it runs, unless there is neither a ``dense_grad`` nor an element of ``order``.

    Args:
        hi, lo, m, v: The matrix's state, each of V·h elements in 1-D.
        counts: int64[1]: U, at most C.
        rows: int64[C]; the first U are distinct and within ``[0, V)``.
        starts: int64[C + 1]; the first U + 1 do not descend and lie within ``[0, len(order)]``.
        order: int64[K], where used within ``[0, N)``; may be empty, then no row of ``dx`` is added.
        dx: bfloat16 or float32 [N, h], contiguous; its width gives h.
        dense_grad: bfloat16 or float32 of V·h elements in 1-D, or None.
        squares: float64[C] or float32[C]; receives the sum of squares of each row's gradient (the
            same bits in every run): NaN if that gradient is not finite, 0 from U on. FP32 overflows
            to infinity for norms above 1.8e19, and the row is updated all the same.
        hyper: All settings, learning rate and weight decay included.

    Raises:
        TypeError: A tensor has another dtype.
        ValueError: A tensor is not on the GPU of ``hi``, strided or of another size.
    """
    n = hi.numel()
    state = _check_state(hi, lo, m, v, hyper)
    table = (counts, rows, starts, order, dx, dense_grad, squares)
    _check_table(*table, hi)
    if dx.shape[1] == 0 or n % dx.shape[1]:
        raise ValueError(f"dx has shape {tuple(dx.shape)}; {n} elements are no rows of its width")
    if dense_grad is not None:
        check_beside("dense_grad", dense_grad, GRADIENTS, (n,), hi)
    from slideformer.kernels import adamw_triton

    constants = all_constants(hyper.lr, hyper.weight_decay, hyper)
    adamw_triton.update_rows(state, *table, constants)


def row_squares_gpu(
    counts: Tensor,
    rows: Tensor,
    starts: Tensor,
    order: Tensor,
    dx: Tensor,
    dense_grad: Tensor | None,
    squares: Tensor,
) -> None:
    """Only the ``squares`` of `adamw_rows_gpu`, from the same arguments; raises as it does."""
    if not triton_enabled(rows):
        raise ValueError(f"rows is on {rows.device}; it must be on a GPU (row_squares serves CPUs)")
    _check_table(counts, rows, starts, order, dx, dense_grad, squares, rows)
    from slideformer.kernels import adamw_triton

    adamw_triton.row_squares(counts, rows, starts, order, dx, dense_grad, squares)


def _check_table(
    counts: Tensor,
    rows: Tensor,
    starts: Tensor,
    order: Tensor,
    dx: Tensor,
    dense_grad: Tensor | None,
    squares: Tensor,
    like: Tensor,
) -> None:
    """Refuse a table of rows that a kernel would misread or that is not where ``like`` is."""
    capacity, integers = rows.numel(), (torch.int64,)
    check_beside("counts", counts, integers, (1,), like)
    check_beside("rows", rows, integers, (capacity,), like)
    check_beside("starts", starts, integers, (capacity + 1,), like)
    check_beside("order", order, integers, (order.numel(),), like)
    check_beside("squares", squares, (torch.float64, torch.float32), (capacity,), like)
    if dx.dim() != 2:
        raise ValueError(f"dx has shape {tuple(dx.shape)}; it must have two dimensions")
    check_beside("dx", dx, GRADIENTS, dx.shape, like)
    if dense_grad is not None:
        check_beside("dense_grad", dense_grad, GRADIENTS, (dense_grad.numel(),), like)


def _check_state(
    hi: Tensor, lo: Tensor, m: Tensor, v: Tensor, hyper: AdamW
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The tensors, unless they are not the state of n parameters on a GPU; for Lion without v."""
    if not triton_enabled(hi):
        raise ValueError(f"hi is on {hi.device}; it must be on a GPU (adamw serves the CPU)")
    shape = (hi.numel(),)
    check_beside("hi", hi, (torch.int16,), shape, hi)
    check_beside("lo", lo, (torch.int16,), shape, hi)
    check_beside("m", m, (torch.float32,), shape, hi)
    lion = isinstance(hyper, Lion)
    check_beside("v", v, (torch.float32,), (0,) if lion else shape, hi)
    return hi, lo, m, None if lion else v
