"""AdamW on the CPU with moments of 8 bits, for split FP32 masters: a call per task.

The state of ``n`` parameters is five contiguous 1-D CPU tensors: ``hi`` and ``lo`` int16 (the
master), ``m`` and ``v`` uint8 (codes of the moments) and ``scales`` float32 [2·blocks], of m and of
v for each block of `BLOCK` elements in turn. ``quantise`` says what codes mean and is the plain
reference; ``adamw.cpp`` does the work, in FP32 as for full moments, and gives the same bits
whatever the threads, and whatever the chunks if they begin at blocks.

Serves no rows of a matrix. Decides nothing about when to update or how to scale gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from slideformer.kernels.adamw import AdamW, Segment
from slideformer.kernels.adamw_checks import (
    check_segments,
    check_tensor,
    check_threads,
    codes_and_master,
)
from slideformer.kernels.adamw_library import (
    Kernels,
    constants_of,
    default_kernels,
    pointers,
    segment_table,
)
from slideformer.kernels.quantise import BLOCK, adamw8_reference, block_count

__all__ = ["BLOCK", "adamw8_reference", "adamw8_update"]


def adamw8_update(
    hi: Tensor,
    lo: Tensor,
    m: Tensor,
    v: Tensor,
    scales: Tensor,
    grad: Tensor,
    segments: Sequence[Segment],
    hyper: AdamW,
    threads: int,
    *,
    kernels: Kernels | None = None,
) -> None:
    """Update the elements that ``segments`` list, in place.

    Other elements keep their master. Where they share a block with one of these, their moments are
    rounded again; zeros stay zero. Gradients are not checked: one that is not finite spoils its
    element's weight and its block's moments.

    Args:
        hi, lo: int16[n]: the master weights.
        m, v: uint8[n]: codes of the moments.
        scales: float32[2·ceil(n / `BLOCK`)].
        grad: bfloat16[n] or float32[n].
        segments: As of ``adamw.adamw_update``.
        hyper: Betas, eps, step and the factor of all gradients.
        threads: Number of threads; the PyTorch version uses PyTorch's own.
        kernels: The implementation; this process's own if None.

    Raises:
        TypeError: A tensor has another dtype.
        ValueError: A tensor is on another device, strided or of another size; segments overlap or
            leave the range; ``threads`` is below 1.
    """
    n = hi.numel()
    for each in codes_and_master(hi, lo, m, v, scales, grad, block_count(n)):
        check_tensor(*each)
    check_threads(threads)
    check_segments(segments, n)
    library = (kernels or default_kernels()).library
    if library is None:
        adamw8_reference(hi, lo, m, v, scales, grad, segments, hyper)
        return
    library.adamw8_dense(
        *pointers(hi, lo, m, v, scales),
        n,
        grad.data_ptr(),
        grad.dtype == torch.float32,
        segment_table(segments, hyper),
        len(segments),
        constants_of(hyper),
        threads,
    )
