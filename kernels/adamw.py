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

from collections.abc import Sequence

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
from slideformer.kernels.adamw_library import (
    Kernels,
    constants_of,
    default_kernels,
    pointers,
    segment_table,
    step_rates,
)
from slideformer.kernels.adamw_reference import (
    AdamW,
    Lion,
    Segment,
    adamw_reference,
    adamw_rows_reference,
)

__all__ = [
    "AdamW",
    "Lion",
    "Segment",
    "adamw_reference",
    "adamw_rows",
    "adamw_rows_reference",
    "adamw_update",
    "stream_copy",
    "stream_rmw",
]


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
        *pointers(hi, lo, m),
        None if lion else v.data_ptr(),
        grad.data_ptr(),
        grad.dtype == torch.float32,
        segment_table(segments, hyper),
        len(segments),
        constants_of(hyper),
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
        *pointers(hi, lo, m),
        None if lion else v.data_ptr(),
        *pointers(rows, starts, order),
        len(rows),
        dx.data_ptr(),
        dx.dtype == torch.float32,
        None if dense_grad is None else dense_grad.data_ptr(),
        dense_grad is not None and dense_grad.dtype == torch.float32,
        dx.shape[1],
        *step_rates(hyper.lr, hyper.weight_decay, hyper),
        constants_of(hyper),
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
    library.stream_rmw(*pointers(a, b, c), a.numel(), threads)


def stream_copy(
    target: Tensor, source: Tensor, threads: int, *, kernels: Kernels | None = None
) -> None:
    """Copy a 1-D tensor to another of its dtype and size, past the caches.

    For what is not used again soon, as PyTorch's copies read the lines that they overwrite. Raises
    as ``adamw_update``.
    """
    for name, x in (("target", target), ("source", source)):
        check_tensor(name, x, (source.dtype,), source.numel())
    check_threads(threads)
    library = (kernels or default_kernels()).library
    if library is None:
        target.copy_(source)
        return
    library.stream_copy(*pointers(target, source), source.nbytes, threads)
