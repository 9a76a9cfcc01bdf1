"""AdamW and Lion in plain PyTorch: settings, and formulas in float64, rounded once a stored value.

Serves as the reference of the compiled kernels and in their place where there is no compiler. Its
bits differ from theirs: those round after every operation.

Arguments are not checked here; ``adamw`` does that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from slideformer.kernels.split import join_master, split_master

_CHUNK = 1 << 18
"""Elements handled at a time: a few MiB of float64 temporaries, which stay in the cache."""


@dataclass(frozen=True, slots=True)
class AdamW:
    """The settings of one optimizer step; ``step`` counts from 1. ValueError: out of range.

    Every gradient is multiplied by ``grad_scale`` in FP32 first; 1 changes no bit.
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int
    grad_scale: float = 1.0

    def __post_init__(self) -> None:
        _check_rates(self.lr, self.weight_decay)
        for name, beta in (("beta1", self.beta1), ("beta2", self.beta2)):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"{name} is {beta}; it must be at least 0 and below 1")
        if not 1e-20 <= self.eps < math.inf:  # below that, FP32 v underflows where eps must act
            raise ValueError(f"eps is {self.eps}; it must be finite and at least 1e-20")
        if self.step < 1:
            raise ValueError(f"step is {self.step}; the first step is 1")
        if not 0.0 <= self.grad_scale < math.inf:
            raise ValueError(f"grad_scale is {self.grad_scale}; it must be finite and not negative")


@dataclass(frozen=True, slots=True)
class Lion(AdamW):
    """The settings of a step of Lion: those of AdamW, of which ``eps`` has no part.

    Its state has no second moment: ``v`` is of length 0.
    """


@dataclass(frozen=True, slots=True)
class Segment:
    """Elements ``[begin, end)`` of a call's tensors, with their learning rate and weight decay."""

    begin: int
    end: int
    lr: float
    weight_decay: float

    def __post_init__(self) -> None:
        _check_rates(self.lr, self.weight_decay)


def adamw_reference(
    hi: Tensor,
    lo: Tensor,
    m: Tensor,
    v: Tensor,
    grad: Tensor,
    segments: Sequence[Segment],
    hyper: AdamW,
) -> None:
    """Update the elements of ``segments`` in place; arguments as ``adamw.adamw_update``'s."""
    for segment in segments:
        for begin in range(segment.begin, segment.end, _CHUNK):
            part = slice(begin, min(begin + _CHUNK, segment.end))
            state = (hi[part], lo[part], m[part], v[part] if len(v) else v)
            _update(*state, grad[part], segment.lr, segment.weight_decay, hyper)


def adamw_rows_reference(
    hi: Tensor,
    lo: Tensor,
    m: Tensor,
    v: Tensor,
    rows: Tensor,
    starts: Tensor,
    order: Tensor,
    dx: Tensor,
    dense_grad: Tensor | None,
    hyper: AdamW,
) -> float:
    """Update ``rows`` of a matrix in place; arguments and result as ``adamw.adamw_rows``'s."""
    hidden = dx.shape[1]
    squares = torch.empty(len(rows), dtype=torch.float64)
    row_squares_reference(rows, starts, order, dx, dense_grad, squares)
    if not squares.isfinite().all():
        return math.nan
    for part in _blocks(rows, hidden):
        listed = rows[part]
        matrices = [x.view(-1, hidden) for x in (hi, lo, m, v) if len(x)]  # Lion has no v
        state = hi_rows, lo_rows, m_rows, *seconds = [x[listed] for x in matrices]
        v_rows = seconds[0] if seconds else v
        grad = _row_gradient(part, rows, starts, order, dx, dense_grad)
        _update(hi_rows, lo_rows, m_rows, v_rows, grad, hyper.lr, hyper.weight_decay, hyper)
        for matrix, updated in zip(matrices, state, strict=True):
            matrix[listed] = updated
    return math.fsum(squares.tolist())


def row_squares_reference(
    rows: Tensor, starts: Tensor, order: Tensor, dx: Tensor, dense_grad: Tensor | None, out: Tensor
) -> None:
    """Arguments as ``row_squares.row_squares``'s."""
    for part in _blocks(rows, dx.shape[1]):
        grad = _row_gradient(part, rows, starts, order, dx, dense_grad).double().numpy()
        out[part] = torch.from_numpy(np.square(grad).sum(axis=1))


def _blocks(rows: Tensor, hidden: int) -> list[slice]:
    block = max(1, _CHUNK // hidden)
    return [slice(u, min(u + block, len(rows))) for u in range(0, len(rows), block)]


def _row_gradient(
    part: slice, rows: Tensor, starts: Tensor, order: Tensor, dx: Tensor, dense_grad: Tensor | None
) -> Tensor:
    """FP32 gradients of the listed rows ``part``: first the dense row, then ``dx`` in order."""
    listed, first, last = rows[part], starts[:-1][part], starts[1:][part]
    if dense_grad is None:
        total = torch.zeros(len(listed), dx.shape[1])
    else:
        total = dense_grad.view(-1, dx.shape[1])[listed].float()
    counts = last - first
    for k in range(int(counts.max())):
        more = (counts > k).nonzero().squeeze(1)
        total[more] += dx[order[first[more] + k]].float()
    return total


def _update(
    hi: Tensor,
    lo: Tensor,
    m: Tensor,
    v: Tensor,
    grad: Tensor,
    lr: float,
    weight_decay: float,
    hyper: AdamW,
) -> None:
    """One step of contiguous elements, in place."""
    g = (grad.float() * hyper.grad_scale).double()
    first = hyper.beta1 * m.double() + (1 - hyper.beta1) * g
    if isinstance(hyper, Lion):
        master = torch.empty_like(m)
        join_master(hi, lo, master)
        w = master.double() * (1 - lr * weight_decay) - lr * first.sign().nan_to_num(0.0)
        m.copy_(hyper.beta2 * m.double() + (1 - hyper.beta2) * g)
        split_master(w.float(), hi, lo)
        return
    second = hyper.beta2 * v.double() + (1 - hyper.beta2) * g * g
    denominator = (second / (1 - hyper.beta2**hyper.step)).sqrt() + hyper.eps
    master = torch.empty_like(m)
    join_master(hi, lo, master)
    w = master.double()
    w = w * (1 - lr * weight_decay) - lr / (1 - hyper.beta1**hyper.step) * first / denominator
    m.copy_(first)
    v.copy_(second)
    split_master(w.float(), hi, lo)


def _check_rates(lr: float, weight_decay: float) -> None:
    for name, value in (("lr", lr), ("weight_decay", weight_decay)):
        if not 0.0 <= value < math.inf:
            raise ValueError(f"{name} is {value}; it must be finite and not negative")
