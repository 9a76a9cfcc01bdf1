"""Moments of AdamW in 8 bits by blocks, and the update with them, in plain PyTorch.

Blocks of `BLOCK` elements share an FP32 scale, the largest magnitude among them. A code stands for
a share of it: 0 for 0, and the highest for 1, from which codes go down with eight steps to each
power of two. A first moment has seven bits and a sign, so shares down to 2^-15.75; a second one has
eight bits, so shares down to 2^-31.75, as its range is the first one's squared: none vanishes where
the other is left.

Codes are rounded stochastically, to the upper one in proportion to how near it is. Rounded to the
nearest, a second moment would never follow its gradients: a step changes it by a thousandth, and
codes lie a sixteenth apart at least. What decides is a hash of the gradient and of the master's
lower half, so the same state and gradient always give the same bits.

Serves as the reference of the compiled kernels, and in their place where there is no compiler.
Arguments are not checked here; ``adamw8`` does that.

Source: Dettmers et al., "8-bit Optimizers via Block-wise Quantization", ICLR 2022, for blocks with
a scale of their own; Gupta et al., "Deep Learning with Limited Numerical Precision", ICML 2015, for
the rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from slideformer.kernels.adamw_reference import AdamW, Segment, adamw_reference

BLOCK = 128
"""Elements that share a scale; blocks begin at multiples of it."""

FIRST, SECOND = 127, 255
"""The highest codes of both moments."""

_PIECE = 1 << 18
"""Elements handled at a time; a multiple of `BLOCK`."""

_SHIFT, _ONE = 20, 0x3F8
"""Bits of an FP32 that a code leaves out, and what is left of those of 1.0."""

_LARGEST = 0x7F7FFFFF
"""Bits of the largest finite FP32."""


def block_count(numel: int) -> int:
    """Blocks of so many elements."""
    return -(-numel // BLOCK)


def decode(codes: Tensor, scales: Tensor, top: int) -> Tensor:
    """FP32 [n] of ``codes`` uint8 [n] whose highest is ``top``; ``scales`` float32 [blocks]."""
    wide = codes.to(torch.int32)
    code = wide & top
    bits = ((code + (_ONE - top)) << _SHIFT).masked_fill_(code == 0, 0)
    share = bits.view(torch.float32)
    signed = torch.where(wide > top, -share, share)
    return signed * scales.repeat_interleave(BLOCK)[: len(codes)]


def encode(values: Tensor, noise: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Codes uint8 [n] and scales float32 [blocks] of ``values`` float32 [n].

    ``noise``, int32 [n] of `rounding_noise`, rounds; 2^19 in its place would round to the nearest.
    """
    blocks = block_count(len(values))
    magnitude = values.abs()
    padded = magnitude.new_zeros(blocks * BLOCK)
    padded[: len(values)] = magnitude
    bits = padded.view(torch.int32).view(-1, BLOCK).amax(1)
    scales = bits.clamp_(max=_LARGEST).view(torch.float32)
    # The inverse of a subnormal scale may be infinite; what is that small has no effect anyway.
    inverse = (1 / scales.where(scales > 0, 1.0)).clamp_(max=torch.finfo(torch.float32).max)
    share = magnitude * inverse.repeat_interleave(BLOCK)[: len(values)]
    code = (((share.view(torch.int32) + noise) >> _SHIFT) - (_ONE - top)).clamp_(0, top)
    return (code + values.signbit() * (FIRST + 1) * (top == FIRST)).to(torch.uint8), scales


def rounding_noise(lo: Tensor, grad: Tensor) -> Tensor:
    """A number below 2^20 for each element, int32 [n], by its master's lower half and gradient.

    These are int16 [n] and bfloat16 or float32 [n].
    """
    mixed = (grad.float().view(torch.int32) + lo) * 0x7FEB352D
    mixed ^= (mixed >> 15) & 0x1FFFF
    return (mixed * 0x2C1B3C6D >> 12) & 0xFFFFF


def adamw8_reference(
    hi: Tensor,
    lo: Tensor,
    m: Tensor,
    v: Tensor,
    scales: Tensor,
    grad: Tensor,
    segments: Sequence[Segment],
    hyper: AdamW,
) -> None:
    """Update the elements of ``segments`` in place; arguments as ``adamw8.adamw8_update``'s."""
    for segment in segments:
        begin, end = segment.begin // BLOCK * BLOCK, min(-(-segment.end // BLOCK) * BLOCK, len(m))
        for first in range(begin, end if segment.begin < segment.end else begin, _PIECE):
            last = min(first + _PIECE, end)
            part, blocks = slice(first, last), slice(first // BLOCK, block_count(last))
            shared = scales.view(-1, 2)[blocks]
            noise = rounding_noise(lo[part], grad[part])
            first_moment = decode(m[part], shared[:, 0], FIRST)
            second_moment = decode(v[part], shared[:, 1], SECOND)
            inside = replace(
                segment, begin=max(segment.begin - first, 0), end=min(segment.end, last) - first
            )
            state = (hi[part], lo[part], first_moment, second_moment)
            adamw_reference(*state, grad[part], [inside], hyper)
            m[part], shared[:, 0] = encode(first_moment, noise, FIRST)
            v[part], shared[:, 1] = encode(second_moment, noise, SECOND)
