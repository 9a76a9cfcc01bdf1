"""What the Triton kernels of AdamW share: split masters, and the arithmetic of a step.

Operations and their order are those at the head of ``adamw.cpp``. Importing it imports Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

from slideformer.kernels.triton_jit import jit

jit_any_range: Callable[[Callable[..., Any]], Any] = triton.jit(do_not_specialize=("begin", "end"))
"""Compile once for all element ranges; their alignment is seen at run time."""


@jit
def load_master(hi: tl.tensor, lo: tl.tensor, at: tl.tensor, mask: tl.tensor | None) -> tl.tensor:
    """The master weights of the elements ``at``."""
    high = tl.load(hi + at, mask=mask).to(tl.int32)
    low = tl.load(lo + at, mask=mask).to(tl.int32)
    return ((high << 16) + low).to(tl.float32, bitcast=True)


@jit
def store_master(
    hi: tl.tensor, lo: tl.tensor, at: tl.tensor, mask: tl.tensor | None, w: tl.tensor
) -> None:
    """Split master weights and put them where they belong."""
    bits = w.to(tl.int32, bitcast=True)
    high = (bits + 0x8000) >> 16
    low = bits - (high << 16)
    nan = w != w
    tl.store(hi + at, tl.where(nan, 0x7FC0, high).to(tl.int16), mask=mask)
    tl.store(lo + at, tl.where(nan, 0, low).to(tl.int16), mask=mask)


@jit
def adamw_step(
    w: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    g: tl.tensor,
    step_size: tl.tensor,
    decay: tl.tensor,
    beta1: tl.tensor,
    beta1_lo: tl.tensor,
    comp1: tl.tensor,
    comp1_lo: tl.tensor,
    beta2: tl.tensor,
    beta2_lo: tl.tensor,
    comp2: tl.tensor,
    comp2_lo: tl.tensor,
    inv_sqrt_bias2: tl.tensor,
    eps: tl.tensor,
    grad_scale: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Weights and moments of AdamW after a step with the gradient ``g``."""
    g = g * grad_scale
    first = tl.fma(beta1, first, tl.fma(comp1, g, tl.fma(beta1_lo, first, comp1_lo * g)))
    p = comp2 * g
    r = tl.fma(comp2_lo, g, tl.fma(comp2, g, -p))
    second = tl.fma(beta2, second, tl.fma(p, g, tl.fma(beta2_lo, second, r * g)))
    d = tl.fma(tl.sqrt_rn(second), inv_sqrt_bias2, eps)
    w -= tl.fma(step_size, tl.div_rn(first, d), decay * w)
    return w, first, second
