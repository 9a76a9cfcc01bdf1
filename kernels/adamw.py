"""AdamW and Lion on the CPU for split FP32 masters (see ``split``), one pass and one call per task.

Settings of the class `Lion` choose that; then there is no second moment, and ``v`` is of length 0.

The state of ``n`` parameters is four contiguous 1-D CPU tensors: ``hi`` and ``lo`` int16 (the
master), ``m`` and ``v`` float32 (the moments). Gradients are bfloat16 or float32. ``adamw.cpp``
does the work and documents its order of operations; it runs without the GIL and gives the same
bits whatever the threads and chunks. Where it cannot be compiled, ``adamw_reference`` takes over,
once for the process, with a warning.

Gradients are multiplied by ``AdamW.grad_scale`` as they are read. Decides nothing about when to
update or how to scale, and does not schedule learning rates.

Source: Loshchilov & Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, algorithm 2;
Chen et al., "Symbolic Discovery of Optimization Algorithms", NeurIPS 2023, algorithm 2.
"""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from slideformer.kernels.adamw_checks import (
    GRADIENTS,
    check_rows,
    check_segments,
    check_state,
    check_tensor,
    check_threads,
)
from slideformer.kernels.adamw_reference import (
    AdamW,
    Lion,
    Segment,
    adamw_reference,
    adamw_rows_reference,
)
from slideformer.kernels.build import BuildError, find_compiler, load_library

__all__ = [
    "FALLBACK_BUILD",
    "AdamW",
    "Kernels",
    "Lion",
    "Segment",
    "adamw_reference",
    "adamw_rows",
    "adamw_rows_reference",
    "adamw_update",
    "default_kernels",
    "kernel_build",
    "load_kernels",
    "stream_rmw",
]

FALLBACK_BUILD = "torch-fallback"

_logger = logging.getLogger(__name__)
_lock = threading.Lock()
_Pointer = ctypes.c_void_p


class _Constants(ctypes.Structure):
    """``Constants`` of adamw.cpp."""

    _fields_ = tuple(
        (name, ctypes.c_float)
        for name in (
            *("beta1", "beta1_lo", "comp1", "comp1_lo"),
            *("beta2", "beta2_lo", "comp2", "comp2_lo"),
            *("inv_sqrt_bias2", "eps", "grad_scale"),
        )
    )


class _Segment(ctypes.Structure):
    """``Segment`` of adamw.cpp."""

    _fields_ = (
        ("begin", ctypes.c_int64),
        ("end", ctypes.c_int64),
        ("step_size", ctypes.c_float),
        ("decay", ctypes.c_float),
    )


@dataclass(frozen=True, slots=True)
class Kernels:
    """An implementation: the compiled one, or PyTorch's where ``library`` is None.

    ``build`` identifies what decides rounding: source, CPU features and compiler.
    """

    library: ctypes.CDLL | None
    build: str


def adamw_update(
    hi: Tensor,
    lo: Tensor,
    m: Tensor,
    v: Tensor,
    grad: Tensor,
    segments: Sequence[Segment],
    hyper: AdamW,
    threads: int,
    *,
    kernels: Kernels | None = None,
) -> None:
    """Update the elements that ``segments`` list, in place; the others stay as they are.

    Gradients are not checked: one that is not finite spoils its element's state.

    Args:
        hi, lo: int16[n]: the master weights.
        m, v: float32[n]: the moments.
        grad: bfloat16[n] or float32[n].
        segments: Ascending, disjoint, within ``[0, n)``. They carry the learning rates and weight
            decays; those of ``hyper`` are not used.
        hyper: Betas, eps, step and the factor of all gradients.
        threads: Number of threads; the PyTorch version uses PyTorch's own.
        kernels: The implementation; this process's own if None.

    Raises:
        TypeError: A tensor has another dtype.
        ValueError: A tensor is on another device, strided or of another size; segments overlap or
            leave the range; ``threads`` is below 1.
    """
    n = hi.numel()
    lion = isinstance(hyper, Lion)
    check_state(hi, lo, m, v, threads, second=not lion)
    check_tensor("grad", grad, GRADIENTS, n)
    check_segments(segments, n)
    library = (kernels or default_kernels()).library
    if library is None:
        adamw_reference(hi, lo, m, v, grad, segments, hyper)
        return
    library.adamw_dense(
        *_pointers(hi, lo, m),
        None if lion else v.data_ptr(),
        grad.data_ptr(),
        grad.dtype == torch.float32,
        _table(segments, hyper),
        len(segments),
        _constants(hyper),
        threads,
    )


def adamw_rows(
    hi: Tensor,
    lo: Tensor,
    m: Tensor,
    v: Tensor,
    rows: Tensor,
    starts: Tensor,
    order: Tensor,
    dx: Tensor,
    dense_grad: Tensor | None,
    hyper: AdamW,
    threads: int,
    *,
    kernels: Kernels | None = None,
) -> float:
    """Update rows of a matrix [V, h] in place, each with the gradient rows that belong to it.

    The gradient of row ``rows[u]`` is its row of ``dense_grad`` (zero without one) plus the rows
    ``order[k]`` of ``dx`` for ``starts[u] <= k < starts[u + 1]``, added in FP32 in this order.

    Args:
        hi, lo, m, v: The matrix's state, int16 and float32, each of V·h elements in 1-D.
        rows: int64[U], strictly ascending.
        starts: int64[U + 1], from 0 to ``len(order)``, not descending.
        order: int64[K], indices of rows of ``dx``; may be empty.
        dx: bfloat16 or float32 [N, h]; its width gives h.
        dense_grad: bfloat16 or float32 of V·h elements in 1-D, or None.
        hyper: All settings, learning rate and weight decay included.
        threads: Number of threads; the PyTorch version uses PyTorch's own.
        kernels: The implementation; this process's own if None.

    Returns:
        The sum of squares of these gradients before scaling, the same for any number of threads;
        NaN if one of them is not finite, and then nothing has been written.

    Raises:
        TypeError: A tensor has another dtype.
        ValueError: A tensor is on another device, strided or of another size, an index is out of
            range or out of order, or ``threads`` is below 1.
    """
    lion = isinstance(hyper, Lion)
    check_state(hi, lo, m, v, threads, second=not lion)
    check_rows(hi.numel(), rows, starts, order, dx, dense_grad)
    library = (kernels or default_kernels()).library
    if library is None:
        return adamw_rows_reference(hi, lo, m, v, rows, starts, order, dx, dense_grad, hyper)
    sums = torch.empty(len(rows), dtype=torch.float64)
    total: float = library.adamw_rows(
        *_pointers(hi, lo, m),
        None if lion else v.data_ptr(),
        *_pointers(rows, starts, order),
        len(rows),
        dx.data_ptr(),
        dx.dtype == torch.float32,
        None if dense_grad is None else dense_grad.data_ptr(),
        dense_grad is not None and dense_grad.dtype == torch.float32,
        dx.shape[1],
        *_rates(hyper.lr, hyper.weight_decay, hyper),
        _constants(hyper),
        sums.data_ptr(),
        threads,
    )
    return total


def stream_rmw(
    a: Tensor, b: Tensor, c: Tensor, threads: int, *, kernels: Kernels | None = None
) -> None:
    """Set ``x = 1 - x`` in three float32[n] tensors: 24 bytes an element, hardly any arithmetic.

    Its rate is what an update in place can reach on this machine. Raises as ``adamw_update``.
    """
    for name, x in (("a", a), ("b", b), ("c", c)):
        check_tensor(name, x, (torch.float32,), a.numel())
    check_threads(threads)
    library = (kernels or default_kernels()).library
    if library is None:
        for x in (a, b, c):
            torch.sub(1.0, x, out=x)
        return
    library.stream_rmw(*_pointers(a, b, c), a.numel(), threads)


def kernel_build() -> str:
    """What decides the rounding of this process's kernels; part of a run's numerics."""
    return default_kernels().build


def default_kernels() -> Kernels:
    """The kernels of this process: made on first use with the compiler that is found."""
    with _lock:  # threads that come at once must not compile, or warn, twice
        return _cached_kernels()


@cache
def _cached_kernels() -> Kernels:
    return load_kernels(find_compiler())


def load_kernels(compiler: str | None) -> Kernels:
    """Compile (or take from the cache) the kernels; without a compiler, warn and use PyTorch's."""
    if compiler is None:
        reason = "no C++ compiler was found"
    else:
        try:
            built = load_library(Path(__file__).with_name("adamw.cpp"), compiler)
        except BuildError as error:
            reason = str(error)
        else:
            _declare(built.library)
            return Kernels(built.library, built.identifier)
    _logger.warning(
        "AdamW on the CPU runs in plain PyTorch, 10 to 30 times slower than the compiled kernel, "
        "because %s\nInstall g++ (Debian and Ubuntu: apt install g++) or set CXX.",
        reason,
    )
    return Kernels(None, FALLBACK_BUILD)


def _declare(library: ctypes.CDLL) -> None:
    """Give the C functions their types."""
    integer, long, real = ctypes.c_int, ctypes.c_int64, ctypes.c_float
    constants, table = ctypes.POINTER(_Constants), ctypes.POINTER(_Segment)
    pointers = (_Pointer,) * 7
    library.adamw_dense.restype = None
    library.adamw_dense.argtypes = [*pointers[:5], integer, table, long, constants, integer]
    library.adamw8_dense.restype = None
    library.adamw8_dense.argtypes = [
        *(*pointers[:5], long, _Pointer, integer, table, long, constants, integer),
    ]
    library.adamw_rows.restype = ctypes.c_double
    library.adamw_rows.argtypes = [
        *(*pointers, long, _Pointer, integer, _Pointer, integer, long),
        *(real, real, constants, _Pointer, integer),
    ]
    library.adamw_row_squares.restype = None
    library.adamw_row_squares.argtypes = [
        *(*pointers[:3], long, _Pointer, integer, _Pointer, integer, long, _Pointer, integer),
    ]
    library.stream_rmw.restype = None
    library.stream_rmw.argtypes = [*pointers[:3], long, integer]


def _table(segments: Sequence[Segment], hyper: AdamW) -> ctypes.Array[_Segment]:
    """Segments as adamw.cpp takes them."""
    table = (_Segment * len(segments))()
    for row, segment in zip(table, segments, strict=True):
        row.begin, row.end = segment.begin, segment.end
        row.step_size, row.decay = _rates(segment.lr, segment.weight_decay, hyper)
    return table


def _rates(lr: float, weight_decay: float, hyper: AdamW) -> tuple[float, float]:
    """``step_size`` and ``decay`` of adamw.cpp."""
    if isinstance(hyper, Lion):
        return lr, lr * weight_decay
    return lr / (1 - hyper.beta1**hyper.step), lr * weight_decay


def _constants(hyper: AdamW) -> _Constants:
    """The constants of adamw.cpp: each beta and its complement as the sum of two floats."""
    pairs: list[float] = []
    for value in (hyper.beta1, 1 - hyper.beta1, hyper.beta2, 1 - hyper.beta2):
        high = float(np.float32(value))
        pairs += (high, value - high)
    inv_sqrt_bias2 = (1 - hyper.beta2**hyper.step) ** -0.5
    return _Constants(*pairs, inv_sqrt_bias2, hyper.eps, hyper.grad_scale)


def _pointers(*tensors: Tensor) -> list[int]:
    return [x.data_ptr() for x in tensors]
