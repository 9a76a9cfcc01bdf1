"""Triton kernels of ``swiglu.py``, which has the formulas. Importing it imports Triton.

Element-wise: one program per piece of a row, in the order of memory, every input read once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from slideformer.kernels.triton_jit import jit

_BLOCK = 1024  # columns of a program: four warps with one 16-byte access to each tensor


@jit
def _activate(gate: tl.tensor, ACTIVATION: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Value and derivative of the activation."""
    if ACTIVATION == "silu":
        share = tl.sigmoid(gate)
        slope = share * (1 + gate * (1 - share))
    elif ACTIVATION == "gelu_pytorch_tanh":
        # (1 + tanh(u)) / 2 = sigmoid(2 u), with 2 u = 2 sqrt(2 / pi) (gate + 0.044715 gate^3)
        square = gate * gate
        share = tl.sigmoid(1.5957691216057308 * gate * (1 + 0.044715 * square))
        slope = 1.5957691216057308 * (1 + 0.134145 * square)
        slope = share * (1 + gate * (1 - share) * slope)
    else:
        share = 0.5 * (1 + tl.erf(gate * 0.7071067811865476))
        slope = share + gate * 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    return gate * share, slope


@jit
def _forward_kernel(
    gate_up: tl.tensor,
    act: tl.tensor,
    width: tl.tensor,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    pieces = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // pieces).to(tl.int64)
    column = tl.program_id(0) % pieces * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    gate_at = gate_up + row * width * 2 + column
    gate = tl.load(gate_at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_at + width, mask=mask, other=0.0).to(tl.float32)
    value, _ = _activate(gate, ACTIVATION)
    tl.store(act + row * width + column, (value * up).to(act.dtype.element_ty), mask=mask)


@jit
def _backward_kernel(
    dact: tl.tensor,
    gate_up: tl.tensor,
    act: tl.tensor,
    width: tl.tensor,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    pieces = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // pieces).to(tl.int64)
    column = tl.program_id(0) % pieces * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    gate_at = gate_up + row * width * 2 + column
    gate = tl.load(gate_at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_at + width, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(dact + row * width + column, mask=mask, other=0.0).to(tl.float32)
    value, slope = _activate(gate, ACTIVATION)
    dtype: tl.constexpr = gate_up.dtype.element_ty
    tl.store(gate_at, (grad * up * slope).to(dtype), mask=mask)
    tl.store(gate_at + width, (grad * value).to(dtype), mask=mask)
    tl.store(act + row * width + column, (value * up).to(dtype), mask=mask)


def swiglu(gate_up: Tensor, activation: str) -> Tensor:
    """See :func:`slideformer.kernels.swiglu.swiglu`."""
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    act = gate_up.new_empty((tokens, width))
    _forward_kernel[(tokens * triton.cdiv(width, _BLOCK),)](
        gate_up, act, width, ACTIVATION=activation, BLOCK=_BLOCK, num_warps=4
    )
    return act


def swiglu_backward(dact: Tensor, gate_up: Tensor, activation: str, out: Tensor | None) -> Tensor:
    """See :func:`slideformer.kernels.swiglu.swiglu_backward`."""
    tokens, width = dact.shape
    act = gate_up.new_empty((tokens, width)) if out is None else out
    _backward_kernel[(tokens * triton.cdiv(width, _BLOCK),)](
        dact, gate_up, act, width, ACTIVATION=activation, BLOCK=_BLOCK, num_warps=4
    )
    return act
