"""Checks of the arguments of kernels, which would read and write wherever they are told.

TypeError for a dtype, ValueError for all else. Values of gradients are not looked at.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from slideformer.kernels.adamw_reference import Segment

GRADIENTS = (torch.bfloat16, torch.float32)
"""What a gradient may be."""


def check_threads(threads: int) -> None:
    """Refuse fewer threads than one."""
    if threads < 1:
        raise ValueError(f"threads is {threads}; it must be at least 1")


def check_segments(segments: Sequence[Segment], n: int) -> None:
    """Refuse segments that do not ascend, that overlap, or that leave ``[0, n)``."""
    previous = 0
    for segment in segments:
        if not previous <= segment.begin <= segment.end <= n:
            raise ValueError(f"{segment} overlaps the one before or leaves [0, {n})")
        previous = segment.end


def check_state(
    hi: Tensor, lo: Tensor, m: Tensor, v: Tensor, threads: int, *, second: bool = True
) -> None:
    """Refuse a master and moments that are not n elements each, and fewer threads than one.

    Without a ``second`` moment ``v`` is to have none.
    """
    n = hi.numel()
    for name, tensor, dtype in (
        ("hi", hi, torch.int16),
        ("lo", lo, torch.int16),
        ("m", m, torch.float32),
    ):
        check_tensor(name, tensor, (dtype,), n)
    check_tensor("v", v, (torch.float32,), n if second else 0)
    check_threads(threads)


def codes_and_master(
    hi: Tensor, lo: Tensor, m: Tensor, v: Tensor, scales: Tensor, grad: Tensor, blocks: int
) -> tuple[tuple[str, Tensor, tuple[torch.dtype, ...], int], ...]:
    """What each tensor of an update with moments of 8 bits is to be: name, dtypes, elements."""
    n = hi.numel()
    return (
        ("hi", hi, (torch.int16,), n),
        ("lo", lo, (torch.int16,), n),
        ("m", m, (torch.uint8,), n),
        ("v", v, (torch.uint8,), n),
        ("scales", scales, (torch.float32,), 2 * blocks),
        ("grad", grad, GRADIENTS, n),
    )


def check_tensor(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], n: int) -> None:
    """Refuse what the C code would misread: a tensor that is not n elements in a row on the CPU."""
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} is {tensor.dtype}; it must be one of {dtypes}")
    if tensor.device.type != "cpu" or not tensor.is_contiguous() or tensor.shape != (n,):
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)} and strides {tensor.stride()} on "
            f"{tensor.device}; it must be {n} contiguous elements in one dimension on the CPU"
        )


def check_beside(
    name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...], hi: Tensor
) -> None:
    """Refuse what a kernel would misread: another shape, gaps, or another device than hi's."""
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} is {tensor.dtype}; it must be one of {dtypes}")
    if tensor.device != hi.device or not tensor.is_contiguous() or tensor.shape != shape:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)} and strides {tensor.stride()} on "
            f"{tensor.device}; it must have shape {tuple(shape)}, contiguous, on {hi.device}"
        )


def check_rows(
    n: int, rows: Tensor, starts: Tensor, order: Tensor, dx: Tensor, dense_grad: Tensor | None
) -> None:
    """Refuse row tables that would read or write out of bounds or update a row twice."""
    for name, tensor, count in (
        ("rows", rows, len(rows)),
        ("starts", starts, len(rows) + 1),
        ("order", order, len(order)),
    ):
        check_tensor(name, tensor, (torch.int64,), count)
    if dx.dim() != 2 or dx.shape[1] == 0 or n % dx.shape[1]:
        raise ValueError(f"dx has shape {tuple(dx.shape)}; {n} elements are no rows of its width")
    check_tensor("dx", dx.view(-1), GRADIENTS, dx.numel())
    if dense_grad is not None:
        check_tensor("dense_grad", dense_grad, GRADIENTS, n)
    height = n // dx.shape[1]
    if len(rows) and (int(rows[0]) < 0 or int(rows[-1]) >= height or (rows.diff() <= 0).any()):
        raise ValueError(f"rows must ascend strictly within [0, {height})")
    if int(starts[0]) != 0 or int(starts[-1]) != len(order) or (starts.diff() < 0).any():
        raise ValueError(f"starts must go from 0 to {len(order)} without descending")
    if len(order) and not 0 <= int(order.min()) <= int(order.max()) < dx.shape[0]:
        raise ValueError(f"order must lie within [0, {dx.shape[0]}), the rows of dx")
