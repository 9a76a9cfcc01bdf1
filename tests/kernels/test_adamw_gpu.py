"""AdamW on the GPU: the bits of the CPU kernel for every finite input.

Without a GPU the kernels run in Triton's interpreter. NumPy has no fma, so the tests give it one
that rounds once; its other operations round as IEEE 754 asks. So the bits must agree there too, and
what only a GPU can show is how the compiler treats each operation. Run as a program, this file
compiles the kernels for Hopper and prints facts about them.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from slideformer.kernels import triton_support
from slideformer.kernels.adamw import (
    AdamW,
    Lion,
    Segment,
    adamw_reference,
    adamw_rows,
    adamw_update,
)
from slideformer.kernels.adamw8 import BLOCK, adamw8_update
from slideformer.kernels.adamw8_gpu import adamw8_update_gpu
from slideformer.kernels.adamw_gpu import adamw_rows_gpu, adamw_update_gpu, row_squares_gpu
from slideformer.kernels.adamw_library import UpdateConstants, default_kernels
from slideformer.kernels.quantise import FIRST, SECOND, encode
from slideformer.kernels.split import join_master, split_master

State = list[Tensor]
"""hi, lo, m, v."""

HYPER = AdamW(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, step=3)
HYPERS = [
    HYPER,
    AdamW(lr=0.3, beta1=0.0, beta2=0.95, eps=1e-20, weight_decay=0.0, step=1),
    AdamW(0.01, 0.95, 0.99, eps=1e-6, weight_decay=1.0, step=70_000, grad_scale=0.37),
]
FLOATS = [torch.float32, torch.bfloat16]
MAX = torch.finfo(torch.float32).max


def fma(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """x·y + z of FP32 values, rounded once.

    The product is exact in FP64. Their sum is rounded to odd there: the inexact and even neighbour
    is replaced by the odd one (Boldo & Melquiond 2008), and then FP32 is the only rounding.
    """
    product, z = x.astype(np.float64) * y, z.astype(np.float64)
    total = product + z
    rest = total - product
    error = (product - (total - rest)) + (z - rest)
    even = np.isfinite(total) & (error != 0) & (total.view(np.int64) % 2 == 0)
    towards = np.where(error > 0, np.inf, -np.inf)
    return np.where(even, np.nextafter(total, towards), total).astype(np.float32)


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[torch.device]:
    """Where the kernels run: interpreted on the CPU with an exact fma, or on the GPU."""
    if shutil.which("g++") is None:
        pytest.skip("the CPU kernel to compare with needs g++")
    assert default_kernels().library is not None
    if request.param == "cuda":
        yield torch.device("cuda")
        return
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton compiles its kernels in this process")
    interpreter = pytest.importorskip("triton.runtime.interpreter")

    def create_fma(_: object, x: Any, y: Any, z: Any) -> Any:
        values = np.broadcast_arrays(x.data, y.data, z.data)
        return interpreter.TensorHandle(fma(*values), z.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", create_fma)
    monkeypatch.setattr(triton_support, "interpret", True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's, on infinities that are meant
        yield torch.device("cpu")


# Values


def split(w: Tensor) -> State:
    hi, lo = (torch.empty(w.shape, dtype=torch.int16) for _ in range(2))
    split_master(w, hi, lo)
    return [hi, lo]


def any_finite(n: int, make: torch.Generator) -> Tensor:
    """FP32 values of all bit patterns but infinities and NaN, many subnormals among them."""
    bits = torch.randint(-(2**31), 2**31, (n,), generator=make).to(torch.int32)
    bits[::9] &= ~0x7F800000  # these have the lowest exponent
    values = bits.view(torch.float32)
    return values.where(values.isfinite(), 1.5)


def any_state(n: int, make: torch.Generator) -> State:
    return [*split(any_finite(n, make)), any_finite(n, make), any_finite(n, make).abs()]


def training_state(n: int, make: torch.Generator) -> State:
    w, m, v = (torch.randn(n, generator=make) for _ in range(3))
    return [*split(0.02 * w), 1e-3 * m, 1e-6 * v.square()]


def gradient(values: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    values = values.to(dtype)
    if device.type == "cpu" and dtype == torch.bfloat16:
        # Triton's interpreter misreads BF16 subnormals.
        values = values.where(values.abs() >= torch.finfo(dtype).tiny, 0.0)
    return values.where(values.isfinite(), 1.0)


def special_elements() -> tuple[State, Tensor]:
    """All combinations of some weights, moments and gradients."""
    tiny = 2.0**-149
    weights = torch.tensor([0.0, -0.0, tiny, -3e-39, 1e-7, -0.5, 1.0 + 2.0**-8, 1e30, MAX])
    m = torch.tensor([0.0, -0.0, -tiny, 1e-38, -1e-3, 1e25, -MAX])
    v = torch.tensor([0.0, tiny, 7e-40, 1.2e-38, 1e-12, 1.0, MAX])
    g = torch.tensor([0.0, -0.0, tiny, -5e-39, 1e-23, -1e-20, 3e-4, 1.0, -1e19, 1e30, MAX])
    w, m, v, g = (x.flatten() for x in torch.meshgrid(weights, m, v, g, indexing="ij"))
    return [*split(w), m.contiguous(), v.contiguous()], g.contiguous()


# Comparison


def copies(state: State, device: torch.device | str = "cpu") -> State:
    return [x.to(device, copy=True) for x in state]


def bits(x: Tensor) -> Tensor:
    return x.cpu().view(torch.int16)


def assert_same_bits(found: State, expected: State) -> None:
    for name, x, y in zip(("hi", "lo", "m", "v"), found, expected, strict=True):
        wrong = (bits(x) != bits(y)).nonzero()
        assert not len(wrong), f"{name}: {len(wrong)} 16-bit words differ, first {wrong[0]}"


def assert_changed(found: State, start: State) -> None:
    for x, y in zip(found, start, strict=True):
        assert not torch.equal(bits(x), bits(y))


def whole(n: int, hyper: AdamW = HYPER) -> list[Segment]:
    return [Segment(0, n, hyper.lr, hyper.weight_decay)]


def run(
    state: State,
    grad: Tensor,
    device: torch.device,
    segments: list[Segment],
    hyper: AdamW = HYPER,
    norm: float = 1.0,
) -> State:
    """The state after an update on ``device``; the arguments stay as they are."""
    state = copies(state, device)
    total = torch.tensor(norm, device=device)
    adamw_update_gpu(*state, grad.to(device), total, segments, hyper)
    return state


# Elements


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("hyper", HYPERS, ids=["usual", "first step", "late step"])
def test_any_finite_input_gives_the_bits_of_the_cpu(
    hyper: AdamW, dtype: torch.dtype, device: torch.device
) -> None:
    n = 3_000_017 if device.type == "cuda" else 3_017
    make = torch.Generator().manual_seed(hyper.step)
    start, grad = any_state(n, make), gradient(any_finite(n, make), dtype, device)
    expected = copies(start)
    adamw_update(*expected, grad, whole(n, hyper), hyper, 2)
    found = run(start, grad, device, whole(n, hyper), hyper)
    assert_same_bits(found, expected)
    assert_changed(found, start)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("lr", [1e-3, 1.0])
def test_zeros_subnormals_and_extremes(lr: float, dtype: torch.dtype, device: torch.device) -> None:
    start, values = special_elements()
    grad = gradient(values, dtype, device)
    n = len(grad)
    hyper = replace(HYPER, lr=lr, eps=1e-20)
    expected = copies(start)
    adamw_update(*expected, grad, whole(n, hyper), hyper, 2)
    assert_same_bits(run(start, grad, device, whole(n, hyper), hyper), expected)


def test_weights_that_do_not_change_are_split_as_before(device: torch.device) -> None:
    """Ties between two BF16 weights among them, and values whose BF16 weight is infinite."""
    n = 4_000
    bits = any_finite(n, torch.Generator().manual_seed(0)).view(torch.int32)
    bits[::2] = (bits[::2] & ~0xFFFF) | 0x8000
    bits[:2] = torch.tensor([0x7F7F8000, 0x7F7FFFFF])
    zeros = torch.zeros(n)
    start = [*split(bits.view(torch.float32)), zeros, zeros]
    assert_same_bits(run(start, zeros, device, [Segment(0, n, 0.0, 0.0)]), start)


@pytest.mark.parametrize("dtype", FLOATS)
def test_many_steps_of_training_give_the_bits_of_the_cpu(
    dtype: torch.dtype, device: torch.device
) -> None:
    n, steps = (1_000_000, 100) if device.type == "cuda" else (2_048, 4)
    make = torch.Generator().manual_seed(0)
    start = training_state(n, make)
    found, expected = copies(start, device), copies(start)
    norm = torch.ones(1, device=device)
    for step in range(1, steps + 1):
        hyper = replace(HYPER, step=step, lr=1e-3 / step)
        grad = (1e-2 * torch.randn(n, generator=make)).to(dtype)
        adamw_update(*expected, grad, whole(n, hyper), hyper, 2)
        adamw_update_gpu(*found, grad.to(device), norm, whole(n, hyper), hyper)
    assert_same_bits(found, expected)
    assert_changed(found, start)


def test_one_step_is_adamw(device: torch.device) -> None:
    """Against the formula in FP64, which rounds only what it stores."""
    n = 2_000
    make = torch.Generator().manual_seed(0)
    start = training_state(n, make)
    grad = 1e-2 * torch.randn(n, generator=make)
    expected = copies(start)
    adamw_reference(*expected, grad, whole(n), HYPER)
    found = copies(run(start, grad, device, whole(n)))
    ulp = 2.0**-23
    masters = []
    for hi, lo, *_ in (found, expected):
        masters.append(torch.empty(n))
        join_master(hi, lo, masters[-1])
    # An ulp of the largest addend for each of the roundings that the reference does not make.
    m_addends = 0.9 * start[2].abs() + 0.1 * grad.abs()
    assert ((found[2] - expected[2]).abs() <= 2 * ulp * m_addends).all()
    assert ((found[3] - expected[3]).abs() <= 2 * ulp * expected[3]).all()
    update = HYPER.lr / (1 - HYPER.beta1**3) * m_addends / (expected[3] / (1 - 0.999**3)).sqrt()
    error = (masters[0] - masters[1]).abs()
    assert (error <= ulp * masters[1].abs() + 8 * ulp * update).all()


def test_a_weight_that_is_not_a_number_is_stored_as_one_pattern(device: torch.device) -> None:
    """A NaN carries bits of its own, which differ between processors."""
    start = training_state(40, torch.Generator().manual_seed(0))
    nans = torch.tensor([0x7F800001, 0x7FC01234, -1, -0x7FFFFF]).int().view(torch.float32)
    assert nans.isnan().all()
    found = run(start, nans.repeat(10), device, whole(40))
    assert found[0].tolist() == [0x7FC0] * 40
    assert found[1].tolist() == [0] * 40


@pytest.mark.parametrize("norm", [math.inf, -math.inf, math.nan])
def test_a_norm_that_is_not_finite_writes_nothing(norm: float, device: torch.device) -> None:
    make = torch.Generator().manual_seed(0)
    start, grad = training_state(1_500, make), torch.randn(1_500, generator=make)
    assert_same_bits(run(start, grad, device, whole(1_500), norm=norm), start)
    assert_changed(run(start, grad, device, whole(1_500), norm=MAX), start)


@pytest.mark.parametrize("dtype", FLOATS)
def test_segments_have_their_rates_and_the_rest_is_untouched(
    dtype: torch.dtype, device: torch.device
) -> None:
    n = 5_000
    make = torch.Generator().manual_seed(0)
    start = training_state(n, make)
    grad = (1e-2 * torch.randn(n, generator=make)).to(dtype)
    segments = [
        Segment(0, 1, 1e-3, 0.1),
        Segment(3, 1000, 1e-2, 0.0),
        Segment(1000, 1030, 2e-2, 0.1),
        Segment(1030, 3072, 1e-4, 0.2),
        Segment(3072, 3072, 1.0, 1.0),
        Segment(3090, 3110, 3e-3, 0.3),
        Segment(4096, 4999, 2e-3, 0.1),
    ]
    expected = copies(start)
    adamw_update(*expected, grad, segments, HYPER, 2)
    found = run(start, grad, device, segments)
    assert_same_bits(found, expected)
    for part in (slice(1, 3), slice(3072, 3090), slice(3110, 4096), slice(4999, n)):
        assert_same_bits([x[part] for x in found], [x[part] for x in start])
    assert_same_bits(run(start, grad, device, []), start)


def test_views_that_begin_anywhere(device: torch.device) -> None:
    n, offset = 1_100, 3
    make = torch.Generator().manual_seed(0)
    start = training_state(n + 2 * offset, make)
    grad = (1e-2 * torch.randn(n + 2 * offset, generator=make)).bfloat16()
    expected, found = copies(start), copies(start, device)
    part = slice(offset, offset + n)
    adamw_update(*(x[part] for x in expected), grad[part], whole(n), HYPER, 1)
    on_device, norm = grad.to(device), torch.ones((), device=device)
    adamw_update_gpu(*(x[part] for x in found), on_device[part], norm, whole(n), HYPER)
    assert_same_bits(found, expected)


# Rows of a matrix


@dataclass
class Rows:
    """A matrix's state and gradients for some of its rows, as the CPU's kernel takes them."""

    state: State
    rows: Tensor
    starts: Tensor
    order: Tensor
    dx: Tensor
    dense_grad: Tensor | None
    hyper: AdamW = HYPER

    @property
    def table(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        return self.rows, self.starts, self.order, self.dx, self.dense_grad

    def expected(self) -> tuple[State, float]:
        state = copies(self.state)
        return state, adamw_rows(*state, *self.table, self.hyper, 2)

    def found(
        self, device: torch.device, spare: int = 3, dtype: torch.dtype = torch.float64
    ) -> tuple[State, Tensor]:
        """State and squares; what lies behind the valid entries would lead out of all bounds."""
        far = torch.full((spare,), 1 << 50)
        state = copies(self.state, device)
        index = [torch.cat([x, far]).to(device) for x in (self.rows, self.starts)]
        index.append(self.order.to(device))
        counts = torch.tensor([len(self.rows)], device=device)
        dense = None if self.dense_grad is None else self.dense_grad.to(device)
        table = (counts, *index, self.dx.to(device), dense)
        before, squares = (
            torch.full((len(index[0]),), fill, dtype=dtype, device=device) for fill in (4.0, 5.0)
        )
        row_squares_gpu(*table, before)
        adamw_rows_gpu(*state, *table, squares, self.hyper)
        assert torch.equal(bits(before), bits(squares)), "known before the update"
        return state, squares.cpu()

    def sums_of_squares(self) -> Tensor:
        """Of each listed row's gradient, a plain sum in FP32, in FP64."""
        hidden = self.dx.shape[1]
        sums = []
        for u, row in enumerate(self.rows.tolist()):
            total = torch.zeros(hidden)
            if self.dense_grad is not None:
                total = self.dense_grad.view(-1, hidden)[row].float()
            for k in range(int(self.starts[u]), int(self.starts[u + 1])):
                total = total + self.dx[self.order[k]].float()
            sums.append(total.double().square().sum())
        return torch.stack(sums)


def make_rows(
    height: int, hidden: int, counts: list[int], dx_type: torch.dtype, dense: torch.dtype | None
) -> Rows:
    """``counts[u]`` rows of dx for the u-th of ``len(counts)`` random rows."""
    make = torch.Generator().manual_seed(3)
    total = sum(counts)
    return Rows(
        training_state(height * hidden, make),
        torch.randperm(height, generator=make)[: len(counts)].sort().values,
        torch.tensor([0, *np.cumsum(counts, dtype=np.int64)]),
        torch.randperm(total, generator=make),
        (1e-2 * torch.randn(total, hidden, generator=make)).to(dx_type),
        None if dense is None else (1e-2 * torch.randn(height * hidden, generator=make)).to(dense),
    )


@pytest.mark.parametrize("dense", [None, *FLOATS])
@pytest.mark.parametrize("dx_type", FLOATS)
@pytest.mark.parametrize("hidden", [5, 640])
def test_rows_get_the_bits_of_the_cpu(
    hidden: int, dx_type: torch.dtype, dense: torch.dtype | None, device: torch.device
) -> None:
    case = make_rows(9, hidden, [1, 0, 11, 8], dx_type, dense)
    expected, total = case.expected()
    found, squares = case.found(device)
    assert_same_bits(found, expected)
    assert_changed(found, case.state)
    torch.testing.assert_close(squares[:4], case.sums_of_squares(), rtol=1e-12, atol=0.0)
    assert squares[4:].tolist() == [0.0] * 3
    assert float(squares.sum()) == pytest.approx(total, rel=1e-12)


def test_scaled_gradients_of_rows_get_the_bits_of_the_cpu(device: torch.device) -> None:
    hyper = replace(HYPER, grad_scale=0.37)
    case = replace(make_rows(9, 640, [1, 0, 11, 8], *FLOATS), hyper=hyper)
    expected, total = case.expected()
    found, squares = case.found(device)
    assert_same_bits(found, expected)
    unscaled, _ = replace(case, hyper=HYPER).found(device)
    assert_changed(found, unscaled)
    assert float(squares.sum()) == pytest.approx(total, rel=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("hidden", [2048, 3072, 16384])
def test_many_rows_of_models_sizes(hidden: int) -> None:
    device = torch.device("cuda")
    counts = np.random.default_rng(0).integers(0, 4, 900).tolist()
    case = make_rows(1_000, hidden, [2_000, *counts], torch.bfloat16, torch.bfloat16)
    expected, total = case.expected()
    found, squares = case.found(device, spare=100)
    assert_same_bits(found, expected)
    assert float(squares.sum()) == pytest.approx(total, rel=1e-12)
    again = case.found(device, spare=100)
    assert torch.equal(again[1], squares)
    single = case.found(device, spare=100, dtype=torch.float32)[1]
    assert float(single.sum()) == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize("dense", [None, torch.bfloat16])
def test_rows_without_dx(dense: torch.dtype | None, device: torch.device) -> None:
    """The rest of the matrix: dense gradients alone, or none, which still decays."""
    case = make_rows(6, 520, [0, 0, 0], torch.bfloat16, dense)
    assert case.order.numel() == 0
    expected, total = case.expected()
    found, squares = case.found(device)
    assert_same_bits(found, expected)
    assert_changed(found, case.state)
    assert float(squares.sum()) == pytest.approx(total, rel=1e-12)
    assert (total > 0) == (dense is not None)


def test_no_rows(device: torch.device) -> None:
    case = make_rows(6, 8, [], torch.bfloat16, torch.bfloat16)
    for spare in (0, 3):
        found, squares = case.found(device, spare)
        assert_same_bits(found, case.state)
        assert squares.tolist() == [0.0] * spare


def test_gradient_rows_are_added_in_the_order_given(device: torch.device) -> None:
    """In FP32, 1 + 1e8 - 1e8 is 0 and 1e8 - 1e8 + 1 is 1."""
    state = training_state(1, torch.Generator().manual_seed(0))
    dx = torch.tensor([[1.0], [1e8], [-1e8]])
    for order, square in (([0, 1, 2], 0.0), ([1, 2, 0], 1.0)):
        case = Rows(state, torch.tensor([0]), torch.tensor([0, 3]), torch.tensor(order), dx, None)
        found, squares = case.found(device)
        assert squares[0] == square
        assert_same_bits(found, case.expected()[0])


def test_a_negative_zero_stays_one(device: torch.device) -> None:
    """It decides the sign of a first moment that is 0, where beta1 has a few digits only."""
    zeros = torch.zeros(2)
    state = [*split(zeros), -zeros, zeros]
    rows, starts = torch.tensor([0, 1]), torch.tensor([0, 0, 1])
    dx = torch.tensor([[-0.0]]).bfloat16()
    hyper = replace(HYPER, beta1=0.5)
    case = Rows(state, rows, starts, torch.tensor([0]), dx, -zeros, hyper)
    expected, _ = case.expected()
    assert expected[2].signbit().all()
    assert_same_bits(case.found(device)[0], expected)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("place", ["dx", "dense"])
def test_a_row_with_a_gradient_that_is_not_finite_stays(
    bad: float, place: str, device: torch.device
) -> None:
    hidden = 530  # the last elements belong to another program than the first
    case = make_rows(5, hidden, [1, 2, 3], torch.bfloat16, torch.float32)
    expected, _ = case.expected()
    assert case.dense_grad is not None
    row = int(case.rows[1])
    if place == "dx":
        case.dx[case.order[2], -1] = bad
    else:
        case.dense_grad[row * hidden + hidden - 1] = bad
    part = slice(row * hidden, (row + 1) * hidden)
    for x, before in zip(expected, case.state, strict=True):
        x[part] = before[part]
    for dtype in (torch.float64, torch.float32):
        found, squares = case.found(device, dtype=dtype)
        assert_same_bits(found, expected)
        assert squares.isnan().tolist() == [False, True, False, False, False, False]


def test_a_sum_that_overflows_writes_nothing(device: torch.device) -> None:
    state = training_state(3, torch.Generator().manual_seed(0))
    dx = torch.full((2, 3), 3e38)
    case = Rows(state, torch.tensor([0]), torch.tensor([0, 2]), torch.tensor([0, 1]), dx, None)
    found, squares = case.found(device)
    assert_same_bits(found, state)
    assert squares.isnan().tolist() == [True, False, False, False]


def test_squares_that_fp32_cannot_hold_do_not_stop_the_row(device: torch.device) -> None:
    state = training_state(2, torch.Generator().manual_seed(0))
    dx = torch.full((1, 2), 1e20)
    case = Rows(state, torch.tensor([0]), torch.tensor([0, 1]), torch.tensor([0]), dx, None)
    expected, total = case.expected()
    for dtype, square in ((torch.float64, total), (torch.float32, math.inf)):
        found, squares = case.found(device, 0, dtype)
        assert_same_bits(found, expected)
        assert squares.tolist() == [pytest.approx(square)]


# What only a GPU shows


@pytest.mark.gpu
def test_more_elements_than_32_bits_count() -> None:
    hidden, tail = 4096, 3
    height = 2**31 // hidden + tail
    n, begin = height * hidden, (height - tail) * hidden
    assert begin == 2**31
    state = [torch.zeros(n, dtype=t, device="cuda") for t in (torch.int16, torch.int16)]
    state += [torch.zeros(n, device="cuda") for _ in range(2)]
    grad = torch.zeros(n, dtype=torch.bfloat16, device="cuda")
    make = torch.Generator().manual_seed(0)
    small = training_state(n - begin, make)
    g = (1e-2 * torch.randn(n - begin, generator=make)).bfloat16()
    grad[begin:] = g
    for x, y in zip(state, small, strict=True):
        x[begin:] = y

    adamw_update_gpu(*state, grad, torch.ones((), device="cuda"), whole(n), HYPER)
    adamw_update(*small, g, whole(n - begin), HYPER, 2)
    assert_same_bits([x[begin:] for x in state], small)

    rows = torch.tensor([height - 2, height - 1], device="cuda")
    starts, order = torch.tensor([0, 0, 1], device="cuda"), torch.tensor([0], device="cuda")
    dx = grad[-hidden:].view(1, hidden)
    squares = torch.empty(2, dtype=torch.float64, device="cuda")
    counts = torch.tensor([2], device="cuda")
    adamw_rows_gpu(*state, counts, rows, starts, order, dx, grad, squares, HYPER)
    table = (torch.tensor([1, 2]), starts.cpu(), order.cpu(), dx.cpu(), g)
    total = adamw_rows(*small, *table, HYPER, 2)
    assert_same_bits([x[begin:] for x in state], small)
    assert float(squares.sum()) == pytest.approx(total, rel=1e-12)
    assert not any(x[:begin].any() for x in state)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_the_host_never_waits() -> None:
    case = make_rows(9, 640, [1, 0, 11, 8], torch.bfloat16, torch.bfloat16)
    state, norm = copies(case.state, "cuda"), torch.ones((), device="cuda")
    counts, squares = torch.tensor([4], device="cuda"), torch.empty(4, device="cuda")
    rows, starts, order, dx, dense = (x.cuda() for x in case.table if x is not None)
    torch.cuda.set_sync_debug_mode("error")
    try:
        adamw_update_gpu(*state, dense, norm, whole(len(dense)), HYPER)
        adamw_rows_gpu(*state, counts, rows, starts, order, dx, dense, squares, HYPER)
        adamw_rows_gpu(*state, counts, rows, starts, order[:0], dx, None, squares, HYPER)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Refusals


def test_wrong_arguments_are_refused(device: torch.device) -> None:
    start = training_state(8, torch.Generator().manual_seed(0))
    state, grad = copies(start, device), torch.ones(8, device=device)
    norm = torch.ones((), device=device)

    def update(
        state: State = state,
        grad: Tensor = grad,
        norm: Tensor = norm,
        segments: list[Segment] = whole(8),  # noqa: B008
    ) -> None:
        adamw_update_gpu(*state, grad, norm, segments, HYPER)

    hi, lo, m, v = state
    with pytest.raises(TypeError, match="grad is"):
        update(grad=grad.half())
    with pytest.raises(TypeError, match="m is"):
        update(state=[hi, lo, m.double(), v])
    with pytest.raises(TypeError, match="norm is"):
        update(norm=norm.half())
    with pytest.raises(ValueError, match="norm has shape"):
        update(norm=torch.ones(2, device=device))
    with pytest.raises(ValueError, match="lo has shape"):
        update(state=[hi, lo[:7], m, v])
    with pytest.raises(ValueError, match="strides"):
        update(grad=torch.ones(16, device=device)[::2])
    with pytest.raises(ValueError, match=r"must have shape \(8,\)"):
        update(grad=grad.view(2, 4))
    with pytest.raises(ValueError, match=r"grad .* on meta"):
        update(grad=grad.to("meta"))
    for bad in ([(0, 9)], [(-1, 4)], [(4, 3)], [(0, 5), (4, 8)], [(4, 8), (0, 4)]):
        with pytest.raises(ValueError, match="Segment"):
            update(segments=[Segment(b, e, 1e-3, 0.0) for b, e in bad])
    assert_same_bits(state, start)


def test_wrong_row_tables_are_refused(device: torch.device) -> None:
    case = make_rows(4, 3, [1, 2], torch.bfloat16, torch.bfloat16)
    good: dict[str, Any] = dict(
        zip(("rows", "starts", "order", "dx", "dense_grad"), case.table, strict=True)
    )
    good |= {"counts": torch.tensor([2]), "squares": torch.zeros(2)}
    bad = {
        "counts has shape": {"counts": torch.tensor(2)},
        "rows has shape": {"rows": case.rows.view(1, 2)},
        "starts has shape": {"starts": case.starts[:2]},
        "order has shape": {"order": case.order.view(3, 1)},
        "squares has shape": {"squares": torch.zeros(3)},
        "dx has shape": {"dx": torch.zeros(3, 5)},
        "dx has shape .* strides": {"dx": torch.zeros(3, 6, device=device)[:, ::2]},
        "dense_grad has shape": {"dense_grad": torch.zeros(11)},
    }
    wrong_types = {
        "rows is": {"rows": case.rows.int()},
        "squares is": {"squares": torch.zeros(2).half()},
        "dx is": {"dx": case.dx.half()},
    }
    state = copies(case.state, device)
    for error, cases in ((ValueError, bad), (TypeError, wrong_types)):
        for message, change in cases.items():
            arguments = {name: x.to(device) for name, x in (good | change).items()}
            with pytest.raises(error, match=message):
                adamw_rows_gpu(*state, **arguments, hyper=HYPER)
    assert_same_bits(state, case.state)


def test_tensors_on_the_cpu_are_refused() -> None:
    state = training_state(8, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="hi is on cpu; it must be on a GPU"):
        adamw_update_gpu(*state, torch.ones(8), torch.ones(()), whole(8), HYPER)


# What the compiler makes of it


def test_the_compiled_kernels_round_every_operation_and_move_16_bytes_at_once(
    tmp_path: Path,
) -> None:
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    environment["PYTHONPATH"] = str(Path(__file__).parent.parent.parent)
    done = subprocess.run(
        [sys.executable, __file__],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts.keys() == {"range", "8 bits", "squares", "rows", "idle rows"}
    for case, found in facts.items():
        assert found["flushing"] == 0, case
        assert found["contractible"] == 0, case
        if case == "squares":
            continue  # reads BF16 only: 8 bytes a thread
        # No layout is converted, but for that of four scales.
        assert found["shared_bytes"] == (16 if case == "8 bits" else 0), case
        if case == "8 bits":
            assert found["divisions"] == found["roots"] + 4 > 4, "both scales', with a mask or not"
            assert found["fma"] == 10 * found["roots"]
            assert found["pairs"] >= 5, "four of 16 bits at once: gradient, halves in and out"
            continue
        assert found["wide_loads"] >= 2, case
        assert found["wide_stores"] >= 2, case
        assert found["divisions"] == found["roots"] > 0, case
        if case != "idle rows":  # their gradient is a constant
            assert found["fma"] == 10 * found["divisions"], case


def compile_for_hopper() -> dict[str, dict[str, int]]:
    """Facts about each kernel's PTX for aligned tensors and sizes, BF16 gradients."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from slideformer.kernels import adamw8_triton
    from slideformer.kernels import adamw_triton as kernels

    names = {
        "*i16": "hi lo",
        "*fp32": "m v scales norm squares",
        "*fp64": "shares",
        "*bf16": "grad dx dense_grad",
        "*i64": "counts rows starts order",
        "i32": "begin end n hidden",
    }
    types = {name: kind for kind, listed in names.items() for name in listed.split()}
    columns = {"COLUMNS": kernels._COLUMNS, "AHEAD": kernels._AHEAD}
    idle = {"order": None, "dense_grad": None}
    cases = {
        "range": (kernels._range_kernel, {"BLOCK": kernels._BLOCK}),
        "8 bits": (adamw8_triton._range_kernel, adamw8_triton.CONSTANTS),
        "squares": (kernels._squares_kernel, columns),
        "rows": (kernels._rows_kernel, columns),
        "idle rows": (kernels._rows_kernel, columns | idle),
    }
    facts = {}
    for case, (kernel, constants) in cases.items():
        arguments = kernel.arg_names
        signature = {name: types[name] for name in arguments if name in types}
        if "constants" in arguments:
            signature["constants"] = UpdateConstants(*["fp32"] * len(UpdateConstants._fields))
        if case == "8 bits":
            signature |= {"m": "*u8", "v": "*u8"}
        signature |= dict.fromkeys(constants, "constexpr")
        unaligned = {"begin", "end", "constants", *constants}
        aligned = [i for i, name in enumerate(arguments) if name not in unaligned]
        source = ASTSource(
            fn=kernel,
            signature=signature,
            constexprs={(arguments.index(name),): x for name, x in constants.items()},
            attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
        )
        elements = constants.get("BLOCK", kernels._COLUMNS) * constants.get("BLOCKS", 1)
        options = {"num_warps": kernels._warps(elements), "enable_fp_fusion": False}
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        ptx = compiled.asm["ptx"]
        patterns = {
            "flushing": r"\.ftz",
            "contractible": r"\b(?:mul|add|sub)\.f(?:32|64)",  # without .rn ptxas may fuse it
            "fma": r"fma\.rn\.f32",
            "divisions": r"div\.rn\.f32",
            "roots": r"sqrt\.rn\.f32",
            "pairs": r"(?:ld|st)\.global\S*\.v2\.b32",
            "wide_loads": r"ld\.global\S*\.v4\.b32",
            "wide_stores": r"st\.global\S*\.v4\.b32",
        }
        facts[case] = {fact: len(re.findall(pattern, ptx)) for fact, pattern in patterns.items()}
        facts[case]["shared_bytes"] = compiled.metadata.shared
    return facts


# Lion

LION = Lion(lr=1e-3, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, step=3, grad_scale=0.7)


def lion_state(n: int, make: torch.Generator, device: torch.device) -> tuple[State, State]:
    """A state without a second moment, on the CPU and on the device."""
    hi, lo, m, v = training_state(n, make)
    m[::7] = 0.0
    return copies((hi, lo, m, v[:0])), copies((hi, lo, m, v[:0]), device)


@pytest.mark.parametrize("dtype", FLOATS)
def test_lion_gives_the_bits_of_the_cpu(dtype: torch.dtype, device: torch.device) -> None:
    make, n = torch.Generator().manual_seed(11), 5000
    expected, found = lion_state(n, make, device)
    start = copies(expected)
    norm = torch.ones((), device=device)
    segments = [Segment(0, 1500, 1e-3, 0.0), Segment(1500, n - 3, 2e-3, 0.1)]
    for step in range(1, 4):
        values = torch.randn(n, generator=make) * 1e-3
        values[::14] = 0.0
        grad, hyper = values.to(dtype), replace(LION, step=step)
        adamw_update(*expected, grad, segments, hyper, 2)
        adamw_update_gpu(*found, grad.to(device), norm, segments, hyper)
    assert_same_bits(found, expected)
    assert not torch.equal(expected[0], start[0])
    adamw_update_gpu(*found, grad.to(device), norm * math.inf, segments, LION)
    assert_same_bits(found, expected)


def test_lion_gives_rows_the_bits_of_the_cpu(device: torch.device) -> None:
    make, hidden, n = torch.Generator().manual_seed(12), 40, 4000
    expected, found = lion_state(n, make, device)
    rows, starts = torch.tensor([1, 4, 99]), torch.tensor([0, 2, 2, 3])
    order, dx = torch.tensor([2, 0, 1]), torch.randn(3, hidden, generator=make).bfloat16()
    dense = torch.randn(n, generator=make).bfloat16()
    adamw_rows(*expected, rows, starts, order, dx, dense, LION, 1)
    squares = torch.empty(3, dtype=torch.float64, device=device)
    table = (torch.tensor([3]), rows, starts, order, dx, dense)
    adamw_rows_gpu(*found, *(x.to(device) for x in table), squares, LION)
    assert_same_bits(found, expected)


# Moments of 8 bits


def encoded(state: State) -> State:
    """hi, lo, m, v and scales, its moments rounded to the nearest code."""
    hi, lo, *moments = state
    half = torch.full((len(hi),), 1 << 19, dtype=torch.int32)
    (m, first), (v, second) = (
        encode(values, half, top) for values, top in zip(moments, (FIRST, SECOND), strict=True)
    )
    return [hi, lo, m, v, torch.stack([first, second], 1).view(-1)]


def assert_all_same(found: State, expected: State) -> None:
    for name, x, y in zip(("hi", "lo", "m", "v", "scales"), found, expected, strict=True):
        wrong = (x.cpu().view(torch.uint8) != y.view(torch.uint8)).nonzero()
        assert not len(wrong), f"{name}: {len(wrong)} bytes differ, first {wrong[0]}"


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("hyper", HYPERS, ids=["usual", "first step", "late step"])
def test_moments_of_8_bits_get_the_bits_of_the_cpu_for_any_finite_input(
    hyper: AdamW, dtype: torch.dtype, device: torch.device
) -> None:
    n = 3_000_017 if device.type == "cuda" else 3_017
    make = torch.Generator().manual_seed(hyper.step)
    start = encoded(any_state(n, make))
    start[2], start[3] = torch.randint(0, 256, (2, n), generator=make).to(torch.uint8)
    grad = gradient(any_finite(n, make), dtype, device)
    expected, found = copies(start), copies(start, device)
    adamw8_update(*expected, grad, whole(n, hyper), hyper, 2)
    adamw8_update_gpu(
        *found, grad.to(device), torch.ones((), device=device), whole(n, hyper), hyper
    )
    assert_all_same(found, expected)
    for x, y in zip(expected, start, strict=True):
        assert not torch.equal(x.view(torch.uint8), y.view(torch.uint8))


@pytest.mark.parametrize("dtype", FLOATS)
def test_moments_of_8_bits_get_the_bits_of_the_cpu_step_after_step(
    dtype: torch.dtype, device: torch.device
) -> None:
    """Segments that begin and end within blocks, and elements between them."""
    n, steps = (1_000_001, 100) if device.type == "cuda" else (2_300, 4)
    make = torch.Generator().manual_seed(5)
    start = encoded(training_state(n, make))
    found, expected = copies(start, device), copies(start)
    norm = torch.ones(1, device=device)
    cuts = [0, 130, 131, 131, 700, n - 3]
    segments = [Segment(a, b, 1e-3 * (i + 1), 0.1 * i) for i, (a, b) in enumerate(pairwise(cuts))]
    del segments[3]
    for step in range(1, steps + 1):
        hyper = replace(HYPER, step=step, grad_scale=0.7)
        grad = (1e-2 * torch.randn(n, generator=make)).to(dtype)
        grad[BLOCK : 2 * BLOCK] = 0.0
        adamw8_update(*expected, grad, segments, hyper, 2)
        adamw8_update_gpu(*found, grad.to(device), norm, segments, hyper)
    assert_all_same(found, expected)
    assert torch.equal(expected[0][131:700], start[0][131:700]), "no segment has these"
    before = copies(expected)
    adamw8_update_gpu(*found, grad.to(device), norm * math.inf, segments, HYPER)
    assert_all_same(found, before)


def test_moments_of_8_bits_on_the_cpu_are_refused() -> None:
    state = encoded(training_state(8, torch.Generator().manual_seed(0)))
    with pytest.raises(ValueError, match="hi is on cpu; it must be on a GPU"):
        adamw8_update_gpu(*state, torch.ones(8), torch.ones(()), whole(8), HYPER)


if __name__ == "__main__":
    json.dump(compile_for_hopper(), sys.stdout)
