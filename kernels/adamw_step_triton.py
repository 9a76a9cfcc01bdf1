"""What the Triton kernels of AdamW and Lion share: split masters, and the arithmetic of a step.

Operations and their order are those at the head of ``adamw.cpp``. Importing it imports Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

from slideformer.kernels.adamw_library import UpdateConstants
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
    w: tl.tensor, first: tl.tensor, second: tl.tensor, g: tl.tensor, constants: UpdateConstants
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Weights and moments of AdamW after a step with the gradient ``g``."""
    c = constants
    g = g * c.grad_scale
    first = tl.fma(c.beta1, first, tl.fma(c.comp1, g, tl.fma(c.beta1_lo, first, c.comp1_lo * g)))
    p = c.comp2 * g
    r = tl.fma(c.comp2_lo, g, tl.fma(c.comp2, g, -p))
    second = tl.fma(c.beta2, second, tl.fma(p, g, tl.fma(c.beta2_lo, second, r * g)))
    d = tl.fma(tl.sqrt_rn(second), c.inv_sqrt_bias2, c.eps)
    w -= tl.fma(c.step_size, tl.div_rn(first, d), c.decay * w)
    return w, first, second


@jit
def lion_step(
    w: tl.tensor, first: tl.tensor, g: tl.tensor, constants: UpdateConstants
) -> tuple[tl.tensor, tl.tensor]:
    """Weights and moments of Lion after a step with the gradient ``g``."""
    c = constants
    g = g * c.grad_scale
    mixed = tl.fma(c.beta1, first, tl.fma(c.comp1, g, tl.fma(c.beta1_lo, first, c.comp1_lo * g)))
    sign = (mixed > 0).to(tl.float32) - (mixed < 0).to(tl.float32)
    w -= tl.fma(c.step_size, sign, c.decay * w)
    first = tl.fma(c.beta2, first, tl.fma(c.comp2, g, tl.fma(c.beta2_lo, first, c.comp2_lo * g)))
    return w, first
