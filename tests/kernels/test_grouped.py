"""Grouped products against one product per group in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from slideformer.kernels.grouped import grouped_gradient_, grouped_product

Close = Callable[..., None]

# Empty groups at either end and between; rows for several rounds, tiles for several programs.
SHAPES = [([0, 3, 0, 70, 1, 0], 24, 40), ([5], 16, 8), ([150, 0, 17], 136, 264), ([0, 0], 8, 8)]


def problem(
    sizes: list[int], n: int, m: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows [R, m], their gradients [R, n], matrices [G, n, m] and the groups' ends."""
    generator = torch.Generator().manual_seed(sum(sizes))
    shapes = (sum(sizes), m), (sum(sizes), n), (len(sizes), n, m)
    rows, d_rows, matrices = (
        torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes
    )
    return rows, d_rows, matrices, torch.tensor(sizes).cumsum(0).int().to(device)


@pytest.mark.parametrize(("sizes", "n", "m"), SHAPES, ids=str)
def test_products(
    sizes: list[int], n: int, m: int, dtype: torch.dtype, device: torch.device, close: Close
) -> None:
    rows, _, matrices, ends = problem(sizes, n, m, dtype, device)
    found = grouped_product(rows, matrices.mT, ends)
    parts = zip(rows.double().split(sizes), matrices.double(), strict=True)
    close(found, torch.cat([part @ matrix.T for part, matrix in parts]), roundings=2)


@pytest.mark.parametrize("accumulate", [False, True], ids=["write", "add"])
@pytest.mark.parametrize(("sizes", "n", "m"), SHAPES, ids=str)
def test_gradients(
    sizes: list[int],
    n: int,
    m: int,
    accumulate: bool,
    dtype: torch.dtype,
    device: torch.device,
    close: Close,
) -> None:
    rows, d_rows, matrices, ends = problem(sizes, n, m, dtype, device)
    parts = zip(d_rows.double().split(sizes), rows.double().split(sizes), strict=True)
    ideal = torch.stack([left.T @ right for left, right in parts])
    out = torch.full_like(matrices, torch.nan)
    if accumulate:
        out = matrices.float()
        ideal = ideal + out.double()
    grouped_gradient_(out, d_rows, rows, ends, accumulate=accumulate)
    close(out, ideal)
    again = matrices.float() if accumulate else torch.full_like(out, torch.nan)
    grouped_gradient_(again, d_rows, rows, ends, accumulate=accumulate)
    assert torch.equal(again, out)


def test_refused() -> None:
    rows, d_rows, matrices, ends = problem([2, 3], 8, 16, torch.bfloat16, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"out \(2, 8, 16\) for 2 groups of left \(5, 16\)"):
        grouped_gradient_(matrices, rows, d_rows, ends, accumulate=False)
    with pytest.raises(ValueError, match="not contiguous"):
        grouped_gradient_(matrices, d_rows.T.contiguous().T, rows, ends, accumulate=False)
    with pytest.raises(ValueError, match=r"float32 only, got torch\.bfloat16"):
        grouped_gradient_(matrices, d_rows, rows, ends, accumulate=True)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_gpu_host_never_waits() -> None:
    sizes = [162, 0, 577, 446, 0, 83]
    args = problem(sizes, 768, 512, torch.bfloat16, torch.device("cuda"))
    rows, d_rows, matrices, ends = args
    for mode in ("default", "error"):  # the first time, kernels are loaded
        torch.cuda.set_sync_debug_mode(mode)
        try:
            grouped_product(rows, matrices.mT, ends)
            grouped_gradient_(matrices, d_rows, rows, ends, accumulate=False)
        finally:
            torch.cuda.set_sync_debug_mode("default")
