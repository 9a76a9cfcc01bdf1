"""Triton kernels of ``cross_entropy.py``, which has the formulas. Importing it imports Triton.

The sweep for the log-sum-exp gives one program to a row; each thread keeps a maximum and a sum of
its own, so the threads meet once at the end. The gradient is element-wise, one program per piece of
a row.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from slideformer.kernels.cross_entropy import LossForm
from slideformer.kernels.reference import IGNORE_INDEX
from slideformer.kernels.triton_jit import jit

_LANES = 1024  # independent running maxima of a row: four for each thread of eight warps
_BLOCK = 2048  # columns of a gradient program

# Stands for "nothing seen yet" in a lane: unlike -inf, its difference to itself is a number.
_LOWEST = tl.constexpr(-3.0e38)
_IGNORED = tl.constexpr(IGNORE_INDEX)


@jit
def _tanh(x: tl.tensor) -> tl.tensor:
    return 2 * tl.sigmoid(2 * x) - 1


@jit
def _lse_kernel(
    logits: tl.tensor,
    targets: tl.tensor,
    running_max: tl.tensor,
    running_sum: tl.tensor,
    target_logit: tl.tensor,
    vocab_start: tl.tensor,
    columns: tl.tensor,
    stride: tl.tensor,
    softcap: tl.tensor | None,
    smoothing: tl.tensor | None,
    spread: tl.tensor | None,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    line = logits + row * stride
    offset = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    lane_max = tl.full([LANES], _LOWEST, tl.float32)
    lane_sum = tl.zeros([LANES], tl.float32)
    lane_total = tl.zeros([LANES], tl.float32)
    for start in range(0, columns, LANES * VECTOR):
        column = start + offset
        mask = column < columns
        logit = tl.load(line + column, mask=mask, other=float("-inf")).to(tl.float32)
        if softcap is not None:
            logit = tl.where(mask, softcap * _tanh(logit / softcap), float("-inf"))
        new_max = tl.maximum(lane_max, tl.max(logit, 1))
        lane_sum = lane_sum * tl.exp(lane_max - new_max)
        lane_sum += tl.sum(tl.exp(logit - new_max[:, None]), 1)
        lane_max = new_max
        if smoothing is not None:
            lane_total += tl.sum(tl.where(mask, logit, 0.0), 1)

    tile_max = tl.max(lane_max, 0)
    tile_sum = tl.sum(lane_sum * tl.exp(lane_max - tile_max), 0)
    old_max = tl.load(running_max + row)
    old_sum = tl.load(running_sum + row)
    row_max = tl.maximum(old_max, tile_max)
    row_sum = old_sum * tl.exp(old_max - row_max) + tile_sum * tl.exp(tile_max - row_max)
    tl.store(running_max + row, row_max)
    tl.store(running_sum + row, row_sum)

    column = tl.load(targets + row) - vocab_start
    inside = (column >= 0) & (column < columns)
    logit = tl.load(line + column, mask=inside, other=0.0).to(tl.float32)
    if softcap is not None:
        logit = softcap * _tanh(logit / softcap)
    picked = tl.load(target_logit + row)
    if smoothing is not None:
        picked += spread * tl.sum(lane_total, 0)
        logit *= 1 - smoothing
    tl.store(target_logit + row, tl.where(inside, picked + logit, picked))


@jit
def _gradient_kernel(
    logits: tl.tensor,
    targets: tl.tensor,
    lse: tl.tensor,
    vocab_start: tl.tensor,
    columns: tl.tensor,
    stride: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor | None,
    smoothing: tl.tensor | None,
    spread: tl.tensor | None,
    z_loss: tl.tensor | None,
    BLOCK: tl.constexpr,
) -> None:
    pieces = tl.cdiv(columns, BLOCK)
    row = (tl.program_id(0) // pieces).to(tl.int64)
    column = tl.program_id(0) % pieces * BLOCK + tl.arange(0, BLOCK)
    target = tl.load(targets + row)
    has_loss = target != _IGNORED
    row_lse = tl.load(lse + row, mask=has_loss, other=0.0)
    mask = column < columns
    valid = mask & has_loss
    at = logits + row * stride + column
    # Rows without loss are not read; exp(-inf) makes them zero.
    logit = tl.load(at, mask=valid, other=float("-inf")).to(tl.float32)
    slope = scale
    if softcap is not None:
        tanh = _tanh(logit / softcap)
        logit = tl.where(valid, softcap * tanh, float("-inf"))
        slope = scale * (1 - tanh * tanh)
    gradient = tl.exp(logit - row_lse)
    if z_loss is not None:
        gradient *= 1 + 2 * z_loss * row_lse
    certain = 1.0
    if smoothing is not None:
        certain = 1 - smoothing
        gradient = tl.where(valid, gradient - spread, 0.0)
    gradient = tl.where(column == target - vocab_start, gradient - certain, gradient) * slope
    tl.store(at, gradient.to(logits.dtype.element_ty), mask=mask)


def lse_accumulate(
    logits: Tensor,
    targets: Tensor,
    vocab_start: int,
    running_max: Tensor,
    running_sum: Tensor,
    target_logit: Tensor,
    form: LossForm,
) -> None:
    """See :func:`slideformer.kernels.cross_entropy.lse_accumulate`."""
    tokens, columns = logits.shape
    _lse_kernel[(tokens,)](
        logits,
        targets,
        running_max,
        running_sum,
        target_logit,
        vocab_start,
        columns,
        logits.stride(0),
        form.softcap,
        form.smoothing,
        None if form.smoothing is None else form.spread,
        LANES=_LANES,
        VECTOR=16 // logits.element_size(),
        num_warps=8,
    )


def softmax_grad_(
    logits: Tensor,
    targets: Tensor,
    vocab_start: int,
    lse: Tensor,
    scale: float,
    form: LossForm,
) -> Tensor:
    """See :func:`slideformer.kernels.cross_entropy.softmax_grad_`."""
    tokens, columns = logits.shape
    _gradient_kernel[(tokens * triton.cdiv(columns, _BLOCK),)](
        logits,
        targets,
        lse,
        vocab_start,
        columns,
        logits.stride(0),
        scale,
        form.softcap,
        form.smoothing,
        None if form.smoothing is None else form.spread,
        form.z_loss,
        BLOCK=_BLOCK,
        num_warps=4,
    )
    return logits
