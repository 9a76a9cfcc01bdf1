"""Triton kernels of ``rms_norm.py``, which has the formulas. Importing it imports Triton.

One program holds whole rows in registers, several of them where rows are short, so every input is
read once. The backward is a fixed number of programs that walk over the rows: each keeps its share
of ``dweight`` in registers and writes it once, and a second small reduction adds the shares in a
fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slideformer.kernels.triton_jit import jit
from slideformer.kernels.triton_support import multiprocessors, row_strides

MAX_ROW = 65536
"""Longest row that one program can hold."""

_MIN_TILE = 2048  # elements of a program; smaller ones cost more to launch than their bytes to move
_SHARED_BYTES = 200 << 10  # of a multiprocessor, for rows that are loaded ahead


@jit
def _forward_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    y: tl.tensor,
    rstd: tl.tensor,
    rows: tl.tensor,
    n: tl.tensor,
    inner: tl.tensor,
    x_outer: tl.tensor,
    x_inner: tl.tensor,
    y_outer: tl.tensor,
    y_inner: tl.tensor,
    eps: tl.tensor,
    CENTRED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    in_row = column < n
    mask = (row < rows)[:, None] & in_row[None, :]
    i = (row // inner).to(tl.int64)[:, None]
    j = (row % inner).to(tl.int64)[:, None]
    dtype: tl.constexpr = y.dtype.element_ty

    value = tl.load(x + i * x_outer + j * x_inner + column, mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 1) / n + eps)
    tl.store(rstd + row, scale, mask=row < rows)
    normalised = value * scale[:, None]
    gain = tl.load(weight + column, mask=in_row, other=0.0).to(tl.float32)
    if CENTRED:
        gain += 1
    else:
        normalised = normalised.to(dtype).to(tl.float32)
    result = normalised * gain[None, :]
    tl.store(y + i * y_outer + j * y_inner + column, result.to(dtype), mask=mask)


@jit
def _backward_kernel(
    dy: tl.tensor,
    x: tl.tensor,
    weight: tl.tensor,
    rstd: tl.tensor,
    residual_grad: tl.tensor | None,
    dx: tl.tensor,
    dweight_shares: tl.tensor,
    rows: tl.tensor,
    n: tl.tensor,
    inner: tl.tensor,
    dy_outer: tl.tensor,
    dy_inner: tl.tensor,
    x_outer: tl.tensor,
    x_inner: tl.tensor,
    dx_outer: tl.tensor,
    dx_inner: tl.tensor,
    residual_outer: tl.tensor,
    residual_inner: tl.tensor,
    CENTRED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    column = tl.arange(0, BLOCK)
    in_row = column < n
    dweight = tl.zeros([ROWS, BLOCK], tl.float32)
    step = tl.num_programs(0) * ROWS
    for start in tl.range(tl.program_id(0) * ROWS, rows, step, num_stages=STAGES):
        row = start + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & in_row[None, :]
        i = (row // inner).to(tl.int64)[:, None]
        j = (row % inner).to(tl.int64)[:, None]
        value = tl.load(x + i * x_outer + j * x_inner + column, mask=mask, other=0.0).to(tl.float32)
        at = dy + i * dy_outer + j * dy_inner + column
        grad = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        scale = tl.load(rstd + row, mask=row < rows, other=0.0)[:, None]
        normalised = value * scale
        dweight += grad * normalised
        # Loaded anew for each row: it stays in the cache and would take registers.
        gain = tl.load(weight + column, mask=in_row, other=0.0).to(tl.float32)[None, :]
        if CENTRED:
            gain += 1
        weighted = grad * gain
        mean = tl.sum(weighted * normalised, 1)[:, None] / n
        result = scale * (weighted - normalised * mean)
        if residual_grad is not None:
            at = residual_grad + i * residual_outer + j * residual_inner + column
            result += tl.load(at, mask=mask, other=0.0).to(tl.float32)
        at = dx + i * dx_outer + j * dx_inner + column
        tl.store(at, result.to(dx.dtype.element_ty), mask=mask)
    share = dweight_shares + tl.program_id(0) * n + column
    tl.store(share, tl.sum(dweight, 0), mask=in_row)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, out: Tensor | None, centred: bool
) -> tuple[Tensor, Tensor]:
    """See :func:`slideformer.kernels.rms_norm.rms_norm`."""
    y = x.new_empty(x.shape) if out is None else out
    inner, strides = row_strides(x, y)
    rows, tile_rows, block = _tile(x)
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    _forward_kernel[(triton.cdiv(rows, tile_rows),)](
        x,
        weight,
        y,
        rstd,
        rows,
        x.shape[-1],
        inner,
        *strides,
        eps,
        CENTRED=centred,
        ROWS=tile_rows,
        BLOCK=block,
        num_warps=min(32, tile_rows * block // 512),  # 16 elements a thread
    )
    return y, rstd


def rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    residual_grad: Tensor | None,
    out: Tensor | None,
    centred: bool,
) -> tuple[Tensor, Tensor]:
    """See :func:`slideformer.kernels.rms_norm.rms_norm_backward`."""
    dx = x.new_empty(x.shape) if out is None else out
    inner, strides = row_strides(dy, x, dx, dy if residual_grad is None else residual_grad)
    n = x.shape[-1]
    rows, tile_rows, block = _tile(x)
    warps, resident, stages = _backward_schedule(n, tile_rows * block, x.element_size())
    programs = min(triton.cdiv(rows, tile_rows), resident * multiprocessors(x.device))
    shares = torch.empty((programs, n), dtype=torch.float32, device=x.device)
    _backward_kernel[(programs,)](
        dy,
        x,
        weight,
        rstd,
        residual_grad,
        dx,
        shares,
        rows,
        n,
        inner,
        *strides,
        CENTRED=centred,
        ROWS=tile_rows,
        BLOCK=block,
        STAGES=stages,
        num_warps=warps,
    )
    return dx, shares.sum(0)


def _tile(x: Tensor) -> tuple[int, int, int]:
    """Rows in all, rows and columns of a program's tile."""
    n = x.shape[-1]
    if n > MAX_ROW:
        raise ValueError(f"RMSNorm over {n} elements: the GPU kernel holds at most {MAX_ROW}")
    block = triton.next_power_of_2(n)
    tile_rows = max(1, _MIN_TILE // block)
    return x.numel() // n, tile_rows, block


def _backward_schedule(n: int, tile: int, itemsize: int) -> tuple[int, int, int]:
    """Warps of a program, programs to a multiprocessor, and tiles in flight in each.

    Those that moved most bytes per second on an H100; ``tile`` is the size of one in elements.
    """
    if tile <= 2048:
        warps, resident, stages = 4, 4, 2
    elif tile <= 4096:
        warps, resident, stages = (8, 3, 1) if n == tile else (8, 2, 3)
    elif tile <= 8192:
        warps, resident, stages = 16, 1, 3
    else:
        warps, resident, stages = 16 if tile <= 16384 else 32, 1, 1
    prefetched = 3 * stages * resident * tile * itemsize  # of dy, x and residual_grad
    return warps, resident, stages if prefetched <= _SHARED_BYTES else 1
