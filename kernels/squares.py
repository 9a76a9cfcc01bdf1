"""Sums of squares, exact enough to not depend on how a gradient is cut into chunks.

Every square is formed and added in FP64: sums over the same elements in another order or in other
pieces differ by about 1e-15 of their value, far less than FP32 tells apart.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slideformer.kernels.triton_support import triton_enabled

_BLOCK = 1 << 18
"""Elements that the reference handles at a time: 2 MiB of float64, which stay in the cache."""


def sum_of_squares(x: Tensor, out: Tensor) -> None:
    """Write the sum of squares of ``x`` to ``out``: not finite exactly if an element is not.

    Args:
        x: bfloat16 or float32 [n], contiguous.
        out: float64 without dimensions, on the device of ``x``.
    """
    if triton_enabled(x):
        from slideformer.kernels.squares_triton import launch

        launch(x, out)
    else:
        sum_of_squares_reference(x, out)


def sum_of_squares_reference(x: Tensor, out: Tensor) -> None:
    """The same in plain PyTorch."""
    out.zero_()
    for block in x.split(_BLOCK):
        wide = block.double()
        out += torch.dot(wide, wide)
