"""Sums of squares: against exact sums, however the elements are cut, and what is not finite."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from slideformer.kernels.squares import sum_of_squares


def found(x: Tensor) -> float:
    out = torch.full((), -1.0, dtype=torch.float64, device=x.device)
    sum_of_squares(x, out)
    return float(out)


def sample(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Values of many sizes, as gradients are."""
    generator = torch.Generator().manual_seed(n)
    sizes = torch.exp(6 * torch.randn(n, generator=generator))
    return (sizes * torch.randn(n, generator=generator)).to(device, dtype)


@pytest.mark.parametrize("n", [0, 1, 100, 4096, 10_001])
def test_it_is_the_exact_sum_to_the_last_digits(
    n: int, dtype: torch.dtype, device: torch.device
) -> None:
    x = sample(n, dtype, device)
    exact = math.fsum(value**2 for value in x.tolist())
    assert found(x) == pytest.approx(exact, rel=1e-14)


def test_pieces_add_up_to_the_whole(dtype: torch.dtype, device: torch.device) -> None:
    """Closer than FP32 tells apart, which sums in FP32 are not."""
    x = sample(9000, dtype, device)
    for cut in (128, 4000, 5120):
        pieces = math.fsum((found(x[:cut]), found(x[cut:])))
        assert pieces == pytest.approx(found(x), rel=1e-14)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_shows(value: float, dtype: torch.dtype, device: torch.device) -> None:
    x = sample(5000, dtype, device)
    x[4500] = value
    assert not math.isfinite(found(x))
    x[4500] = 3e38
    assert math.isfinite(found(x))
