"""Triton kernel of ``adamw8_gpu.py``. Importing it imports Triton.

It performs the operations that the head of ``adamw.cpp`` lists, in its order, so it gives its bits:
see ``adamw_triton.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from slideformer.kernels.adamw_library import UpdateConstants
from slideformer.kernels.adamw_step_triton import (
    adamw_step,
    jit_any_range,
    load_master,
    store_master,
)
from slideformer.kernels.quantise import BLOCK, FIRST, SECOND
from slideformer.kernels.triton_jit import jit

_BLOCKS = 4  # of a program
_WARPS = 4  # so that a thread handles four elements, as in the kernels for full moments
CONSTANTS = {"BLOCKS": _BLOCKS, "BLOCK": BLOCK, "FIRST": FIRST, "SECOND": SECOND}
"""What the kernel is compiled with."""


@jit
def _decode(codes: tl.tensor, scale: tl.tensor, TOP: tl.constexpr) -> tl.tensor:
    """Moments [blocks, elements]; ``codes`` are int32, ``scale`` is [blocks, 1]."""
    code = codes & TOP
    bits = tl.where(code == 0, 0, (code + (0x3F8 - TOP)) << 20)
    bits = bits | ((codes & (255 - TOP)) << 24)
    return bits.to(tl.float32, bitcast=True) * scale


@jit
def _encode(values: tl.tensor, noise: tl.tensor, TOP: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Codes [blocks, elements] and scales [blocks, 1]."""
    bits = values.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    most = tl.minimum(tl.max(magnitude, 1, keep_dims=True), 0x7F7FFFFF)
    scale = most.to(tl.float32, bitcast=True)
    ratio = tl.div_rn(tl.full(most.shape, 1.0, tl.float32), tl.where(most == 0, 1.0, scale))
    share = magnitude.to(tl.float32, bitcast=True) * tl.minimum(ratio, 3.4028234663852886e38)
    code = ((share.to(tl.int32, bitcast=True) + noise) >> 20) - (0x3F8 - TOP)
    code = tl.minimum(tl.maximum(code, 0), TOP)
    code = code | ((bits >> 24) & (255 - TOP))
    return code.to(tl.uint8), scale


@jit
def _update(
    hi: tl.tensor,
    lo: tl.tensor,
    m: tl.tensor,
    v: tl.tensor,
    scales: tl.tensor,
    grad: tl.tensor,
    block: tl.tensor,
    touched: tl.tensor | None,
    there: tl.tensor | None,
    inside: tl.tensor | None,
    constants: UpdateConstants,
    BLOCK: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
) -> None:
    """One step of the blocks ``block`` [blocks, 1].

    Of these the ``touched`` ones are written, their elements that are ``there``, and updated those
    ``inside`` the range; all of them where that is None.
    """
    at = block * BLOCK + tl.arange(0, BLOCK)[None, :]
    g = tl.load(grad + at, mask=there).to(tl.float32)
    x = g.to(tl.int32, bitcast=True) + tl.load(lo + at, mask=there).to(tl.int32)
    x = x * 0x7FEB352D
    x = x ^ ((x >> 15) & 0x1FFFF)
    noise = ((x * 0x2C1B3C6D) >> 12) & 0xFFFFF

    m_scale = tl.load(scales + 2 * block, mask=touched)
    v_scale = tl.load(scales + 2 * block + 1, mask=touched)
    m_codes = tl.load(m + at, mask=there).to(tl.int32)
    v_codes = tl.load(v + at, mask=there).to(tl.int32)
    m_before = _decode(m_codes, m_scale, FIRST)
    v_before = _decode(v_codes, v_scale, SECOND)
    w = load_master(hi, lo, at, inside)
    w, first, second = adamw_step(w, m_before, v_before, g, constants)
    store_master(hi, lo, at, inside, w)
    if inside is not None:
        # Others keep their moments, but share the new scale; those beyond the end have no part.
        first = tl.where(inside, first, tl.where(there, m_before, 0.0))
        second = tl.where(inside, second, tl.where(there, v_before, 0.0))
    m_codes, m_scale = _encode(first, noise, FIRST)
    v_codes, v_scale = _encode(second, noise, SECOND)
    tl.store(m + at, m_codes, mask=there)
    tl.store(v + at, v_codes, mask=there)
    tl.store(scales + 2 * block, m_scale, mask=touched)
    tl.store(scales + 2 * block + 1, v_scale, mask=touched)


@jit_any_range
def _range_kernel(
    hi: tl.tensor,
    lo: tl.tensor,
    m: tl.tensor,
    v: tl.tensor,
    scales: tl.tensor,
    grad: tl.tensor,
    norm: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    n: tl.tensor,
    constants: UpdateConstants,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
) -> None:
    # As for full moments, only a program that the range does not fill needs masks.
    if tl.abs(tl.load(norm)) < float("inf"):
        start = (begin // BLOCK // BLOCKS + tl.program_id(0)).to(tl.int64) * BLOCKS
        block = start + tl.arange(0, BLOCKS)[:, None]
        if (start * BLOCK >= begin) & ((start + BLOCKS) * BLOCK <= end):
            _update(
                *(hi, lo, m, v, scales, grad, block, None, None, None),
                *(constants, BLOCK, FIRST, SECOND),
            )
        else:
            at = block * BLOCK + tl.arange(0, BLOCK)[None, :]
            touched = (block * BLOCK < end) & (block * BLOCK + BLOCK > begin)
            there, inside = touched & (at < n), (at >= begin) & (at < end)
            _update(
                *(hi, lo, m, v, scales, grad, block, touched, there, inside),
                *(constants, BLOCK, FIRST, SECOND),
            )


def update_range(
    state: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    grad: Tensor,
    norm: Tensor,
    begin: int,
    end: int,
    constants: UpdateConstants,
) -> None:
    """Update the elements ``[begin, end)``, at least one."""
    programs = triton.cdiv(end, _BLOCKS * BLOCK) - begin // (_BLOCKS * BLOCK)
    _range_kernel[(programs,)](
        *state,
        grad,
        norm,
        begin,
        end,
        len(grad),
        constants,
        **CONSTANTS,
        num_warps=_WARPS,
        enable_fp_fusion=False,
    )
