"""AdamW with moments of 8 bits on the GPU, for units whose state stays there.

The same update as ``adamw8.adamw8_update``, with the same bits for every finite input. Work is
queued on the current stream and the host never waits. Serves no CPU tensors and no rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from slideformer.kernels.adamw import AdamW, Segment
from slideformer.kernels.adamw_checks import check_beside, check_segments, codes_and_master
from slideformer.kernels.adamw_library import all_constants
from slideformer.kernels.quantise import block_count
from slideformer.kernels.triton_support import triton_enabled


def adamw8_update_gpu(
    hi: Tensor,
    lo: Tensor,
    m: Tensor,
    v: Tensor,
    scales: Tensor,
    grad: Tensor,
    norm: Tensor,
    segments: Sequence[Segment],
    hyper: AdamW,
) -> None:
    """Update the elements that ``segments`` list, in place, if ``norm`` is finite; else nothing.

    Launches one kernel per segment. It is fastest where the tensors begin at 16-byte boundaries.

    Args:
        hi, lo: int16[n]: the master weights.
        m, v: uint8[n]: codes of the moments.
        scales: float32[2·ceil(n / `BLOCK`)].
        grad: bfloat16[n] or float32[n].
        norm: float32 or float64, one element: whatever tells if the gradient is finite.
        segments, hyper: As of ``adamw8.adamw8_update``.

    Raises:
        TypeError: A tensor has another dtype.
        ValueError: A tensor is not on the GPU of ``hi``, strided or of another size; segments
            overlap or leave the range.
    """
    if not triton_enabled(hi):
        raise ValueError(f"hi is on {hi.device}; it must be on a GPU (adamw8 serves the CPU)")
    n = hi.numel()
    for name, tensor, dtypes, numel in codes_and_master(hi, lo, m, v, scales, grad, block_count(n)):
        check_beside(name, tensor, dtypes, (numel,), hi)
    check_beside("norm", norm.reshape(-1), (torch.float32, torch.float64), (1,), hi)
    check_segments(segments, n)
    from slideformer.kernels import adamw8_triton

    state = (hi, lo, m, v, scales)
    for segment in segments:
        if segment.begin < segment.end:
            constants = all_constants(segment.lr, segment.weight_decay, hyper)
            adamw8_triton.update_range(state, grad, norm, segment.begin, segment.end, constants)
