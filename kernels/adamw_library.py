"""The compiled library of the CPU kernels, and their arguments in the form that it takes.

``adamw.cpp`` is compiled on first use. Where it cannot be, plain PyTorch serves, once for the
process, with a warning.
"""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from slideformer.kernels.adamw_reference import AdamW, Lion, Segment
from slideformer.kernels.build import BuildError, find_compiler, load_library

FALLBACK_BUILD = "torch-fallback"

_logger = logging.getLogger(__name__)
_lock = threading.Lock()
_Pointer = ctypes.c_void_p


class UpdateConstants(NamedTuple):
    """What an update of a range of elements calculates with, by its names in adamw.cpp."""

    step_size: float
    decay: float
    beta1: float
    beta1_lo: float
    comp1: float
    comp1_lo: float
    beta2: float
    beta2_lo: float
    comp2: float
    comp2_lo: float
    inv_sqrt_bias2: float
    eps: float
    grad_scale: float


class _Constants(ctypes.Structure):
    """``Constants`` of adamw.cpp: what does not differ between the segments of a call."""

    _fields_ = tuple((name, ctypes.c_float) for name in UpdateConstants._fields[2:])


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
    arrays = (_Pointer,) * 7
    library.adamw_dense.restype = None
    library.adamw_dense.argtypes = [*arrays[:5], integer, table, long, constants, integer]
    library.adamw8_dense.restype = None
    library.adamw8_dense.argtypes = [
        *(*arrays[:5], long, _Pointer, integer, table, long, constants, integer),
    ]
    library.adamw_rows.restype = ctypes.c_double
    library.adamw_rows.argtypes = [
        *(*arrays, long, _Pointer, integer, _Pointer, integer, long),
        *(real, real, constants, _Pointer, integer),
    ]
    library.adamw_row_squares.restype = None
    library.adamw_row_squares.argtypes = [
        *(*arrays[:3], long, _Pointer, integer, _Pointer, integer, long, _Pointer, integer),
    ]
    library.stream_rmw.restype = None
    library.stream_rmw.argtypes = [*arrays[:3], long, integer]
    library.stream_copy.restype = None
    library.stream_copy.argtypes = [*arrays[:2], long, integer]


def segment_table(segments: Sequence[Segment], hyper: AdamW) -> ctypes.Array[_Segment]:
    """Segments as adamw.cpp takes them."""
    table = (_Segment * len(segments))()
    for row, segment in zip(table, segments, strict=True):
        row.begin, row.end = segment.begin, segment.end
        row.step_size, row.decay = step_rates(segment.lr, segment.weight_decay, hyper)
    return table


def step_rates(lr: float, weight_decay: float, hyper: AdamW) -> tuple[float, float]:
    """``step_size`` and ``decay`` of adamw.cpp."""
    if isinstance(hyper, Lion):
        return lr, lr * weight_decay
    return lr / (1 - hyper.beta1**hyper.step), lr * weight_decay


def constants_of(hyper: AdamW) -> _Constants:
    """The constants of adamw.cpp: each beta and its complement as the sum of two floats."""
    pairs: list[float] = []
    for value in (hyper.beta1, 1 - hyper.beta1, hyper.beta2, 1 - hyper.beta2):
        high = float(np.float32(value))
        pairs += (high, value - high)
    inv_sqrt_bias2 = (1 - hyper.beta2**hyper.step) ** -0.5
    return _Constants(*pairs, inv_sqrt_bias2, hyper.eps, hyper.grad_scale)


def all_constants(lr: float, weight_decay: float, hyper: AdamW) -> UpdateConstants:
    """The constants of adamw.cpp with the rates of one segment."""
    constants = constants_of(hyper)
    fields = (float(getattr(constants, name)) for name in UpdateConstants._fields[2:])
    return UpdateConstants(*step_rates(lr, weight_decay, hyper), *fields)


def pointers(*tensors: Tensor) -> list[int]:
    """Where their elements begin."""
    return [x.data_ptr() for x in tensors]
