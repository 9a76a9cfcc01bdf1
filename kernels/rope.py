"""Rotary position embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864), in place.

Half-split convention of Hugging Face (``rotate_half``): with ``x = (a | b)`` cut in the middle,
``a' = a * cos - b * sin`` and ``b' = b * cos + a * sin``, in FP32 with one rounding. The backward
is the transpose: the same with ``-sin``. The tables are made elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slideformer.kernels import reference
from slideformer.kernels.triton_support import triton_enabled


def rope_(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """Rotate every head of ``x`` in place, and return ``x``.

    ``x`` is ``[B, S, H, D]``, bf16 or fp32, D even, with any strides but a contiguous last
    dimension: the query and key heads of a fused projection are one such view. ``cos`` and ``sin``
    are float32 ``[S, D]`` or ``[B, S, D]`` (B may be 1), as Hugging Face's rotary embeddings
    produce: both halves alike (only the first is read), attention scaling included.

    ``inverse=True`` applies the transpose, which takes the output's gradient to the input's. Raises
    ``ValueError`` if the shapes do not fit.
    """
    if x.ndim != 4 or x.shape[-1] % 2 or x.stride(-1) != 1:
        raise ValueError(
            f"rope_ got x of shape {tuple(x.shape)}, strides {x.stride()}: it must be [batch, "
            "sequence, heads, head size], with an even and contiguous last dimension"
        )
    tables = ((x.shape[1], x.shape[3]), (1, *x.shape[1::2]), (*x.shape[:2], x.shape[3]))
    if cos.shape != sin.shape or tuple(cos.shape) not in tables:
        raise ValueError(
            f"rope_ got cos {tuple(cos.shape)} and sin {tuple(sin.shape)} for x of shape "
            f"{tuple(x.shape)}: both must be [sequence, head size] or [batch, sequence, head size]"
        )
    if cos.stride(-1) != 1 or sin.stride(-1) != 1:
        raise ValueError("rope_ got tables that are not contiguous in the last dimension")
    if cos.dtype != torch.float32 or sin.dtype != torch.float32:
        raise ValueError(f"rope_ got cos in {cos.dtype} and sin in {sin.dtype}: use float32 tables")
    if triton_enabled(x):
        from slideformer.kernels import rope_triton

        return rope_triton.rope_(x, cos, sin, inverse)
    return reference.rope_(x, cos, sin, inverse)
