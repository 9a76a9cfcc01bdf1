"""Rows that were sorted by expert, brought back to their tokens; and products of rows.

A token's k experts each give it a row. Sorting puts the rows of an expert next to each other, for
one grouped matrix product; :func:`gather_sum` undoes the sorting and adds up what each token gets.
Results are FP32 sums in a fixed order, rounded once. The router and the products are not here.
"""

from __future__ import annotations

from torch import Tensor

from slideformer.kernels import reference
from slideformer.kernels.triton_support import triton_enabled


def gather_sum(
    rows: Tensor, places: Tensor, weights: Tensor | None, residual: Tensor, out: Tensor
) -> None:
    """``out[t] = residual[t] + sum over j of weights[t, j] * rows[places[t, j]]``.

    ``rows`` is ``[R, n]``, ``residual`` and ``out`` ``[T, n]``, all contiguous, bf16 or fp32;
    ``places`` int64 ``[T, k]``, contiguous, and ``weights`` float32 ``[T, k]``, or None for ones.
    ``out`` may be ``residual``. Raises ``ValueError`` if the shapes do not fit.
    """
    tokens, width = out.shape
    if rows.shape[1:] != (width,) or residual.shape != out.shape or places.shape[:1] != (tokens,):
        raise ValueError(
            f"gather_sum got rows {tuple(rows.shape)}, places {tuple(places.shape)}, residual "
            f"{tuple(residual.shape)} and out {tuple(out.shape)}: they must be [rows, n], "
            "[tokens, k], [tokens, n] and [tokens, n]"
        )
    if weights is not None and weights.shape != places.shape:
        raise ValueError(
            f"gather_sum got weights {tuple(weights.shape)} for places {tuple(places.shape)}"
        )
    if triton_enabled(rows):
        from slideformer.kernels import routed_triton

        routed_triton.gather_sum(rows, places, weights, residual, out)
    else:
        reference.gather_sum(rows, places, weights, residual, out)


def row_products(left: Tensor, right: Tensor) -> Tensor:
    """Inner product of each row of ``left`` ``[R, n]`` with its row of ``right``, float32 ``[R]``.

    Both are contiguous, bf16 or fp32. Raises ``ValueError`` if the shapes differ.
    """
    if left.shape != right.shape or left.ndim != 2:
        raise ValueError(
            f"row_products got {tuple(left.shape)} and {tuple(right.shape)}: both must be [rows, n]"
        )
    if triton_enabled(left):
        from slideformer.kernels import routed_triton

        return routed_triton.row_products(left, right)
    return reference.row_products(left, right)
