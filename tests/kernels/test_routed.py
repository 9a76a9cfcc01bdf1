"""Gathered sums and products of rows against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from slideformer.kernels.routed import gather_sum, row_products

Close = Callable[..., None]


@pytest.mark.parametrize("weighted", [False, True], ids=["sum", "weighted"])
@pytest.mark.parametrize(
    ("tokens", "each", "width"), [(5, 1, 33), (7, 3, 1024), (3, 8, 1500), (0, 2, 8)], ids=str
)
def test_gathered_sums(
    tokens: int,
    each: int,
    width: int,
    weighted: bool,
    dtype: torch.dtype,
    device: torch.device,
    close: Close,
) -> None:
    generator = torch.Generator().manual_seed(width)
    count = tokens * each
    rows = torch.randn(count, width, generator=generator).to(device, dtype)
    places = torch.randperm(count, generator=generator).view(tokens, each).to(device)
    weights = torch.randn(tokens, each, generator=generator).to(device) if weighted else None
    residual = torch.randn(tokens, width, generator=generator).to(device, dtype)
    factors = torch.ones(tokens, each) if weights is None else weights.cpu()
    picked = rows.cpu().double()[places.cpu()] * factors.double()[..., None]
    ideal = residual.cpu().double() + picked.sum(1)
    out = torch.full_like(residual, torch.nan)

    gather_sum(rows, places, weights, residual, out)
    close(out, ideal)

    gather_sum(rows, places, weights, residual, residual)
    assert torch.equal(residual, out)


@pytest.mark.parametrize("shape", [(5, 33), (3, 2500), (0, 8)], ids=str)
def test_products_of_rows(
    shape: tuple[int, int], dtype: torch.dtype, device: torch.device, close: Close
) -> None:
    generator = torch.Generator().manual_seed(shape[1])
    left, right = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
    found = row_products(left, right)
    assert found.dtype is torch.float32
    close(found, (left.double() * right.double()).sum(-1))


def test_refused() -> None:
    rows, places = torch.ones(6, 4), torch.zeros(3, 2, dtype=torch.int64)
    out = torch.ones(3, 4)
    with pytest.raises(ValueError, match=r"rows \(6, 4\).* out \(3, 5\)"):
        gather_sum(rows, places, None, torch.ones(3, 5), torch.ones(3, 5))
    with pytest.raises(ValueError, match=r"weights \(3, 1\) for places \(3, 2\)"):
        gather_sum(rows, places, torch.ones(3, 1), out, out)
    with pytest.raises(ValueError, match=r"\(6, 4\) and \(3, 4\)"):
        row_products(rows, out)
