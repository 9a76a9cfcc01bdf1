"""Lion: the formula, the same bits whatever the threads, segments and rows."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from slideformer.kernels.adamw import Lion, Segment, adamw_rows, adamw_update
from slideformer.kernels.adamw_library import Kernels, default_kernels
from slideformer.kernels.split import join_master, split_master

HYPER = Lion(lr=1e-3, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, step=3)
N = 5000
NOTHING = torch.empty(0)
State = tuple[Tensor, Tensor, Tensor]


def state(seed: int = 0, n: int = N) -> State:
    """Master and moment as in training, some of the moments zero."""
    make = torch.Generator().manual_seed(seed)
    hi, lo = torch.empty(2, n, dtype=torch.int16)
    split_master(torch.randn(n, generator=make), hi, lo)
    m = torch.randn(n, generator=make) * 1e-3
    m[::7] = 0.0
    return hi, lo, m


def gradient(seed: int = 1, n: int = N, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    make = torch.Generator().manual_seed(seed)
    found = (torch.randn(n, generator=make) * 1e-3).to(dtype)
    found[::14] = 0.0
    return found


def weights(of: State) -> Tensor:
    out = torch.empty(len(of[0]))
    join_master(of[0], of[1], out)
    return out


def copies(of: State) -> State:
    hi, lo, m = (x.clone() for x in of)
    return hi, lo, m


def update(
    of: State, grad: Tensor, hyper: Lion = HYPER, threads: int = 1, kernels: Kernels | None = None
) -> None:
    whole = [Segment(0, len(grad), hyper.lr, hyper.weight_decay)]
    adamw_update(*of, NOTHING, grad, whole, hyper, threads, kernels=kernels)


def assert_same_bits(found: State, expected: State) -> None:
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_step_is_that_of_the_paper(dtype: torch.dtype, compiled: bool) -> None:
    kernels = default_kernels() if compiled else Kernels(None, "none")
    before, grad = state(), gradient(dtype=dtype)
    hyper = replace(HYPER, grad_scale=0.5)
    after = copies(before)
    update(after, grad, hyper, kernels=kernels)
    w, m, g = weights(before).double(), before[2].double(), grad.double() * 0.5
    direction = (0.9 * m + 0.1 * g).sign()
    assert (direction == 0).sum() == len(range(0, N, 14)), "where both are zero, and nowhere else"
    expected = w - 1e-3 * (direction + 0.1 * w)
    torch.testing.assert_close(weights(after).double(), expected, rtol=3e-7, atol=1e-9)
    torch.testing.assert_close(after[2].double(), 0.99 * m + 0.01 * g, rtol=3e-7, atol=1e-12)
    # AdamW of the same settings would go elsewhere.
    assert (weights(after) - weights(before)).abs().max() < 2e-3


@pytest.mark.parametrize("cuts", [[0, 1, 63, 64, 4097, N], list(range(0, N + 1, 500))])
def test_threads_and_segments_change_no_bit(cuts: list[int]) -> None:
    before, grad = state(), gradient()
    plain = copies(before)
    update(plain, grad)
    pieces = copies(before)
    segments = [Segment(a, b, HYPER.lr, HYPER.weight_decay) for a, b in pairwise(cuts)]
    adamw_update(*pieces, NOTHING, grad, segments, HYPER, 3)
    assert_same_bits(pieces, plain)


def test_segments_have_their_rates_and_the_rest_is_untouched() -> None:
    before, grad = state(), gradient()
    after = copies(before)
    adamw_update(*after, NOTHING, grad, [Segment(100, 200, 0.5, 0.0)], HYPER, 2)
    moved = (weights(after) - weights(before)).abs()
    assert torch.equal(
        moved.nonzero().view(-1), torch.tensor([i for i in range(100, 200) if i % 14])
    )
    torch.testing.assert_close(moved[100:200].max(), torch.tensor(0.5))


@pytest.mark.parametrize("compiled", [True, False])
def test_rows_get_the_bits_of_a_dense_update(compiled: bool) -> None:
    kernels = default_kernels() if compiled else Kernels(None, "none")
    hidden, rows = 20, torch.tensor([0, 3, 7, 249])
    before, grad = state(), gradient(dtype=torch.float32)
    by_row = copies(before)
    starts = torch.arange(len(rows) + 1)
    dx = grad.view(-1, hidden)[rows].contiguous()
    total = adamw_rows(
        *by_row, NOTHING, rows, starts, starts[:-1], dx, None, HYPER, 2, kernels=kernels
    )
    assert total == pytest.approx(float(dx.double().square().sum()), rel=1e-12)
    dense = copies(before)
    segments = [
        Segment(int(r) * hidden, (int(r) + 1) * hidden, HYPER.lr, HYPER.weight_decay) for r in rows
    ]
    adamw_update(*dense, NOTHING, grad, segments, HYPER, 1, kernels=kernels)
    assert_same_bits(by_row, dense)


def test_a_gradient_that_is_not_a_number_spoils_the_moment_alone() -> None:
    before, grad = state(), gradient()
    grad[5] = math.nan
    after = copies(before)
    update(after, grad)
    assert after[2].isnan().nonzero().tolist() == [[5]]
    assert weights(after).isfinite().all()


def test_a_second_moment_is_refused() -> None:
    with pytest.raises(ValueError, match=r"v has shape .* it must be 0 contiguous elements"):
        adamw_update(*state(), torch.zeros(N), gradient(), [], HYPER, 1)
