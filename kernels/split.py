"""The split FP32 master weight: a BF16 weight and the 16-bit remainder that makes it exact.

``hi = (bits + 0x8000) >> 16`` rounds the FP32 bits to BF16 (nearest, ties away from zero) and
``lo = int16(bits - (hi << 16))`` is what the rounding took away or added. Both fit into 16 bits for
every value that is not NaN; a NaN is stored as ``(0x7FC0, 0)``. ``hi`` is what the model computes
with and what crosses PCIe; ``lo`` stays with the optimizer. Finite values above the largest BF16
number have an infinite ``hi`` and still join to themselves.

Works on CPU and CUDA tensors. No arithmetic on weights happens here.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 1 << 20
"""Elements handled at a time: at most 24 MiB of temporaries, which stay in a server's cache."""

_NAN_BITS = 0x7FC00000
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def split_master(src: Tensor, hi: Tensor, lo: Tensor) -> None:
    """Write the two halves of ``src`` into ``hi`` and ``lo``.

    Args:
        src: float32, bfloat16 or float16 values, contiguous, of any shape.
        hi: int16, contiguous, as many elements as ``src``; receives the BF16 bits.
        lo: int16, contiguous, as many elements as ``src``; receives the remainders.

    Raises:
        TypeError: A dtype is not one of these.
        ValueError: Sizes or devices differ, or a tensor is not contiguous.
    """
    _check({"src": (src, _FLOATS), "hi": (hi, (torch.int16,)), "lo": (lo, (torch.int16,))})
    src, hi, lo = src.view(-1), hi.view(-1), lo.view(-1)
    for begin in range(0, src.numel(), _CHUNK):
        part = slice(begin, begin + _CHUNK)
        values = src[part].float()
        bits = torch.where(values.isnan(), _NAN_BITS, values.view(torch.int32))
        high = (bits + 0x8000) >> 16  # without NaN the sum cannot wrap
        hi[part] = high
        lo[part] = bits - (high << 16)


def join_master(hi: Tensor, lo: Tensor, out: Tensor) -> None:
    """Write the FP32 values whose halves are ``hi`` and ``lo`` into ``out``, bit for bit.

    Args:
        hi: int16, contiguous, of any shape.
        lo: int16, contiguous, as many elements as ``hi``.
        out: float32, contiguous, as many elements as ``hi``.

    Raises:
        TypeError: A dtype is not one of these.
        ValueError: Sizes or devices differ, or a tensor is not contiguous.
    """
    _check({"hi": (hi, (torch.int16,)), "lo": (lo, (torch.int16,)), "out": (out, (torch.float32,))})
    hi, lo, bits = hi.view(-1), lo.view(-1), out.view(-1).view(torch.int32)
    for begin in range(0, hi.numel(), _CHUNK):
        part = slice(begin, begin + _CHUNK)
        chunk = bits[part]
        chunk.copy_(hi[part])
        chunk <<= 16
        chunk += lo[part]


def _check(tensors: dict[str, tuple[Tensor, tuple[torch.dtype, ...]]]) -> None:
    """Refuse tensors that differ in size or device, are strided, or have another dtype."""
    first_name, (first, _) = next(iter(tensors.items()))
    for name, (tensor, dtypes) in tensors.items():
        if tensor.dtype not in dtypes:
            raise TypeError(f"{name} is {tensor.dtype}; it must be one of {dtypes}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}; it must be contiguous")
        if tensor.numel() != first.numel() or tensor.device != first.device:
            raise ValueError(
                f"{name} has {tensor.numel()} elements on {tensor.device}, {first_name} has "
                f"{first.numel()} on {first.device}; they must agree"
            )
