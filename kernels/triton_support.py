"""What the Triton launchers share: the choice of implementation, row addressing, device facts.

Importing this module does not import Triton: the ``*_triton`` modules do, and they are loaded when
the first tensor that they serve arrives.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

interpret = False
"""Set by tests to send CPU tensors to the kernels too.

Triton must then be an interpreter, which takes ``TRITON_INTERPRET=1`` in the environment before its
first import.
"""


def triton_enabled(x: Tensor) -> bool:
    """True if ``x`` is to be served by a Triton kernel, False if by the reference."""
    return x.is_cuda or interpret


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; a small number for the CPU (the interpreter)."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def row_strides(*tensors: Tensor) -> tuple[int, tuple[int, ...]]:
    """Address the rows (last dimension) of equally shaped tensors by two strides each.

    Returns ``inner`` and ``(outer_0, inner_0, outer_1, inner_1, ...)``: row ``r`` of tensor ``k``
    begins at element ``r // inner * outer_k + r % inner * inner_k``. ``inner`` is 1 if all leading
    dimensions of every tensor are evenly spaced, else the size of the last leading dimension.
    Raises ``ValueError`` for a tensor whose other leading dimensions are not evenly spaced.
    """
    spacings = [_spacing(t.shape[:-1], t.stride()[:-1]) for t in tensors]
    strides: list[int] = []
    if None not in spacings:
        for spacing in spacings:
            strides += (spacing or 0, 0)
        return 1, tuple(strides)
    for t in tensors:
        outer = _spacing(t.shape[:-2], t.stride()[:-2])
        if outer is None:
            raise ValueError(
                f"tensor of shape {tuple(t.shape)}, strides {t.stride()}: the rows must be evenly "
                "spaced but for the last leading dimension; make it contiguous first"
            )
        strides += (outer, t.stride(-2))
    return tensors[0].shape[-2], tuple(strides)


def _spacing(shape: Sequence[int], strides: Sequence[int]) -> int | None:
    """The one stride that walks over all these dimensions in row-major order, None if none does."""
    spacing: int | None = None
    extent = 0
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size == 1:
            continue
        if spacing is None:
            spacing, extent = stride, stride * size
        elif stride == extent:
            extent *= size
        else:
            return None
    return spacing or 0
