"""Triton kernels of ``adamw_gpu.py``. Importing it imports Triton.

They perform the operations that the head of ``adamw.cpp`` lists, in its order, so they give its
bits. For that every launch turns the contraction of products and sums off. Division and square root
are the rounded ones, and nothing flushes subnormals.

Bound by memory: a thread handles four elements, so FP32 accesses are 16 bytes wide and no layout
is converted between the 16-bit and the 32-bit arrays.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from slideformer.kernels.adamw_library import UpdateConstants
from slideformer.kernels.adamw_step_triton import (
    adamw_step,
    jit_any_range,
    lion_step,
    load_master,
    store_master,
)
from slideformer.kernels.triton_jit import jit

_BLOCK = 1024  # elements of a dense program
_COLUMNS = 512  # of a row's program; divides most models' hidden sizes, so that no thread idles
_THREAD = 4  # elements of a thread
_AHEAD = 8  # gradient rows whose loads are in flight together; their sum is serial


@jit
def _update(
    hi: tl.tensor,
    lo: tl.tensor,
    m: tl.tensor,
    v: tl.tensor | None,
    at: tl.tensor,
    mask: tl.tensor | None,
    g: tl.tensor,
    constants: UpdateConstants,
) -> None:
    """One step of the elements ``at``, whose gradient is ``g``."""
    w = load_master(hi, lo, at, mask)
    first = tl.load(m + at, mask=mask)
    if v is None:  # Lion
        w, first = lion_step(w, first, g, constants)
    else:
        second = tl.load(v + at, mask=mask)
        w, first, second = adamw_step(w, first, second, g, constants)
        tl.store(v + at, second, mask=mask)
    store_master(hi, lo, at, mask, w)
    tl.store(m + at, first, mask=mask)


@jit_any_range
def _range_kernel(
    hi: tl.tensor,
    lo: tl.tensor,
    m: tl.tensor,
    v: tl.tensor | None,
    grad: tl.tensor,
    norm: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    constants: UpdateConstants,
    BLOCK: tl.constexpr,
) -> None:
    # Blocks begin at multiples of BLOCK in the array, whatever the range, so that accesses are
    # aligned; only a block that the range does not fill needs a mask, which would split them.
    start = (begin // BLOCK + tl.program_id(0)).to(tl.int64) * BLOCK
    at = start + tl.arange(0, BLOCK)
    if tl.abs(tl.load(norm)) < float("inf"):
        if (start >= begin) & (start + BLOCK <= end):
            g = tl.load(grad + at).to(tl.float32)
            _update(hi, lo, m, v, at, None, g, constants)
        else:
            mask = (at >= begin) & (at < end)
            g = tl.load(grad + at, mask=mask).to(tl.float32)
            _update(hi, lo, m, v, at, mask, g, constants)


@jit
def _row_gradient(
    u: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    mask: tl.tensor,
    starts: tl.tensor,
    order: tl.tensor | None,
    dx: tl.tensor,
    dense_grad: tl.tensor | None,
    hidden: tl.tensor,
    COLUMNS: tl.constexpr,
    AHEAD: tl.constexpr,
) -> tl.tensor:
    """Some columns of the gradient of the u-th listed row, summed in the order given."""
    if dense_grad is not None:
        dense_row = dense_grad + row * hidden
        total = tl.load(dense_row + column, mask=mask, other=0.0).to(tl.float32)
    else:
        total = tl.zeros([COLUMNS], tl.float32)
    if order is not None:
        last = tl.load(starts + u + 1)
        for k in range(tl.load(starts + u), last, AHEAD):
            for i in tl.static_range(AHEAD):
                more = k + i < last
                dx_row = dx + tl.load(order + k + i, mask=more, other=0) * hidden
                addend = tl.load(dx_row + column, mask=mask & more, other=0.0).to(tl.float32)
                # Adding 0 where there is no row would turn -0 into 0.
                total = tl.where(more, total + addend, total)
    return total


@jit
def _squares_kernel(
    counts: tl.tensor,
    rows: tl.tensor,
    starts: tl.tensor,
    order: tl.tensor | None,
    dx: tl.tensor,
    dense_grad: tl.tensor | None,
    shares: tl.tensor,
    hidden: tl.tensor,
    COLUMNS: tl.constexpr,
    AHEAD: tl.constexpr,
) -> None:
    pieces = tl.cdiv(hidden, COLUMNS)
    u = tl.program_id(0) // pieces
    if u < tl.load(counts):
        column = tl.program_id(0) % pieces * COLUMNS + tl.arange(0, COLUMNS)
        mask = column < hidden
        row = tl.load(rows + u)
        g = _row_gradient(
            u, row, column, mask, starts, order, dx, dense_grad, hidden, COLUMNS, AHEAD
        ).to(tl.float64)
        # Squares of finite FP32 values fit into FP64: the sum is finite exactly if they are.
        share = tl.sum(g * g)
        tl.store(shares + tl.program_id(0), tl.where(share < float("inf"), share, float("nan")))
    else:
        tl.store(shares + tl.program_id(0), 0.0)


@jit
def _rows_kernel(
    hi: tl.tensor,
    lo: tl.tensor,
    m: tl.tensor,
    v: tl.tensor | None,
    counts: tl.tensor,
    rows: tl.tensor,
    starts: tl.tensor,
    order: tl.tensor | None,
    dx: tl.tensor,
    dense_grad: tl.tensor | None,
    squares: tl.tensor,
    hidden: tl.tensor,
    constants: UpdateConstants,
    COLUMNS: tl.constexpr,
    AHEAD: tl.constexpr,
) -> None:
    pieces = tl.cdiv(hidden, COLUMNS)
    u = tl.program_id(0) // pieces
    if u < tl.load(counts):
        square = tl.load(squares + u)
        row = tl.load(rows + u)
        if square == square:  # not NaN
            column = tl.program_id(0) % pieces * COLUMNS + tl.arange(0, COLUMNS)
            mask = column < hidden
            g = _row_gradient(
                u, row, column, mask, starts, order, dx, dense_grad, hidden, COLUMNS, AHEAD
            )
            _update(hi, lo, m, v, row * hidden + column, mask, g, constants)


def update_range(
    state: tuple[Tensor, Tensor, Tensor, Tensor | None],
    grad: Tensor,
    norm: Tensor,
    begin: int,
    end: int,
    constants: UpdateConstants,
) -> None:
    """Update the elements ``[begin, end)``, at least one."""
    blocks = triton.cdiv(end, _BLOCK) - begin // _BLOCK
    _range_kernel[(blocks,)](
        *state,
        grad,
        norm,
        begin,
        end,
        constants,
        BLOCK=_BLOCK,
        num_warps=_warps(_BLOCK),
        enable_fp_fusion=False,
    )


def update_rows(
    state: tuple[Tensor, Tensor, Tensor, Tensor | None],
    counts: Tensor,
    rows: Tensor,
    starts: Tensor,
    order: Tensor,
    dx: Tensor,
    dense_grad: Tensor | None,
    squares: Tensor,
    constants: UpdateConstants,
) -> None:
    """See :func:`slideformer.kernels.adamw_gpu.adamw_rows_gpu`."""
    row_squares(counts, rows, starts, order, dx, dense_grad, squares)
    hidden = dx.shape[1]
    pieces, options = _pieces(hidden)
    table = (counts, rows, starts, order if order.numel() else None, dx, dense_grad)
    _rows_kernel[(len(rows) * pieces,)](*state, *table, squares, hidden, constants, **options)


def row_squares(
    counts: Tensor,
    rows: Tensor,
    starts: Tensor,
    order: Tensor,
    dx: Tensor,
    dense_grad: Tensor | None,
    squares: Tensor,
) -> None:
    """See :func:`slideformer.kernels.adamw_gpu.row_squares_gpu`."""
    capacity, hidden = len(rows), dx.shape[1]
    added = order if order.numel() else None
    if added is None and dense_grad is None:
        squares.zero_()
        return
    pieces, options = _pieces(hidden)
    shares = torch.empty((capacity, pieces), dtype=torch.float64, device=rows.device)
    table = (counts, rows, starts, added, dx, dense_grad)
    _squares_kernel[(capacity * pieces,)](*table, shares, hidden, **options)
    squares.copy_(shares.sum(1))


def _pieces(hidden: int) -> tuple[int, dict[str, Any]]:
    """Programs of a row, and how they are launched."""
    columns = min(_COLUMNS, max(32 * _THREAD, triton.next_power_of_2(hidden)))
    return triton.cdiv(hidden, columns), {
        "COLUMNS": columns,
        "AHEAD": _AHEAD,
        "num_warps": _warps(columns),
        "enable_fp_fusion": False,
    }


def _warps(elements: int) -> int:
    return elements // (32 * _THREAD)
