"""Squares of the gradients of a matrix's rows, to know their norm before any row is updated.

The sums are those that ``adamw.adamw_rows`` forms of the same rows, with the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slideformer.kernels.adamw_checks import check_rows, check_tensor, check_threads
from slideformer.kernels.adamw_library import Kernels, default_kernels, pointers
from slideformer.kernels.adamw_reference import row_squares_reference


def row_squares(
    height: int,
    rows: Tensor,
    starts: Tensor,
    order: Tensor,
    dx: Tensor,
    dense_grad: Tensor | None,
    out: Tensor,
    threads: int,
    *,
    kernels: Kernels | None = None,
) -> None:
    """Write the sum of squares of the gradient of each of ``rows`` to ``out``, float64[U].

    ``height`` is the number of the matrix's rows; ``rows``, ``starts``, ``order``, ``dx``,
    ``dense_grad``, ``threads`` and ``kernels``, and what they raise, are those of
    ``adamw.adamw_rows``. A sum is not finite exactly if one of its elements is not.
    """
    check_threads(threads)
    check_rows(height * dx.shape[-1], rows, starts, order, dx, dense_grad)
    check_tensor("out", out, (torch.float64,), len(rows))
    library = (kernels or default_kernels()).library
    if library is None:
        row_squares_reference(rows, starts, order, dx, dense_grad, out)
        return
    library.adamw_row_squares(
        *pointers(rows, starts, order),
        len(rows),
        dx.data_ptr(),
        dx.dtype == torch.float32,
        None if dense_grad is None else dense_grad.data_ptr(),
        dense_grad is not None and dense_grad.dtype == torch.float32,
        dx.shape[1],
        out.data_ptr(),
        threads,
    )
