"""AdamW on the CPU: accuracy against float64, exact rounding, the same bits for any threads."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slideformer.kernels import adamw_library
from slideformer.kernels.adamw import (
    AdamW,
    Segment,
    adamw_rows,
    adamw_update,
    stream_copy,
    stream_rmw,
)
from slideformer.kernels.adamw_library import Kernels, default_kernels, kernel_build, load_kernels
from slideformer.kernels.row_squares import row_squares
from slideformer.kernels.split import join_master, split_master

HYPER = AdamW(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, step=3)

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
TORCH = Kernels(None, adamw_library.FALLBACK_BUILD)


def compiled() -> Kernels:
    kernels = default_kernels()
    assert kernels.library is not None
    return kernels


@pytest.fixture(scope="module", params=[pytest.param("compiled", marks=needs_compiler), "torch"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return compiled() if request.param == "compiled" else TORCH


@dataclass
class State:
    """Master and moments of some elements."""

    hi: Tensor
    lo: Tensor
    m: Tensor
    v: Tensor

    @classmethod
    def of(cls, w: Tensor, m: Tensor, v: Tensor) -> State:
        hi = torch.empty(w.shape, dtype=torch.int16)
        lo = torch.empty_like(hi)
        split_master(w, hi, lo)
        return cls(hi, lo, m.clone(), v.clone())

    @classmethod
    def random(cls, n: int, seed: int = 0) -> State:
        """Weights, moments and gradients as training has them, and a few extremes."""
        make = torch.Generator().manual_seed(seed)
        w = torch.randn(n, generator=make) * 0.02
        m = torch.randn(n, generator=make) * 1e-3
        v = torch.randn(n, generator=make).square() * 1e-6
        m[::7] = 0.0
        v[::7] = 0.0
        w[::11] = 1.0
        return cls.of(w, m, v)

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.hi, self.lo, self.m, self.v))

    def __getitem__(self, part: slice) -> State:
        """A view of some elements."""
        return State(*(x[part] for x in self))

    def clone(self) -> State:
        return State(*(x.clone() for x in self))

    @property
    def w(self) -> Tensor:
        out = torch.empty(self.hi.shape)
        join_master(self.hi, self.lo, out)
        return out

    def same_bits(self, other: State) -> bool:
        mine, theirs = ([x.numpy().tobytes() for x in state] for state in (self, other))
        return mine == theirs


def random_gradient(n: int, dtype: torch.dtype = torch.bfloat16, seed: int = 1) -> Tensor:
    return (torch.randn(n, generator=torch.Generator().manual_seed(seed)) * 1e-2).to(dtype)


def zeros(n: int, count: int) -> list[Tensor]:
    return [torch.zeros(n) for _ in range(count)]


def whole(n: int, hyper: AdamW) -> list[Segment]:
    return [Segment(0, n, hyper.lr, hyper.weight_decay)]


def ulp(x: np.ndarray) -> np.ndarray:
    """The distance between neighbouring FP32 values at x."""
    return np.spacing(np.maximum(np.abs(x), 2.0**-126).astype(np.float32)).astype(np.float64)


# Accuracy


def values(low: int, high: int) -> st.SearchStrategy[float]:
    """FP32 numbers of all magnitudes from 2^low to 2^high, and zero."""
    return st.one_of(
        st.just(0.0),
        st.builds(
            lambda sign, exponent, mantissa: float(np.float32(sign * mantissa * 2.0**exponent)),
            st.sampled_from([-1.0, 1.0]),
            st.integers(low, high - 1),
            st.floats(1.0, 2.0, width=32),
        ),
    )


@st.composite
def cases(draw: st.DrawFn) -> tuple[State, Tensor, AdamW]:
    n = draw(st.integers(1, 16))

    def tensor(low: int, high: int) -> Tensor:
        return torch.tensor(draw(st.lists(values(low, high), min_size=n, max_size=n)))

    state = State.of(tensor(-30, 10), tensor(-60, 20), tensor(-120, 40).abs())
    grad = tensor(-60, 20).to(draw(st.sampled_from([torch.bfloat16, torch.float32])))
    beta = st.floats(0.0, 0.9999)
    hyper = AdamW(
        lr=draw(st.just(0.0) | st.floats(1e-20, 0.5)),  # a subnormal rate has few bits in FP32
        beta1=draw(st.sampled_from([0.0, 0.8, 0.9, 0.95]) | beta),
        beta2=draw(st.sampled_from([0.95, 0.99, 0.999]) | beta),
        eps=draw(st.sampled_from([1e-8, 1e-6, 1e-10])),
        weight_decay=draw(st.floats(0.0, 1.0)),
        step=draw(st.integers(1, 10_000)),
        grad_scale=draw(st.just(1.0) | st.floats(2**-10, 1.0, width=32)),
    )
    return state, grad, hyper


@pytest.mark.parametrize("kernels", ["compiled", "torch"], indirect=True)
@given(case=cases())
@settings(max_examples=80)
def test_one_step_is_within_the_bounds_of_float64(
    kernels: Kernels, case: tuple[State, Tensor, AdamW]
) -> None:
    state, grad, hyper = case
    check_one_step(kernels, state, grad, hyper)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("beta1", "beta2", "step"), [(0.9, 0.999, 1), (0.95, 0.95, 700)])
def test_one_step_of_many_elements_is_within_the_bounds(
    kernels: Kernels, dtype: torch.dtype, beta1: float, beta2: float, step: int
) -> None:
    n = 300_000
    random = np.random.default_rng(0)

    def spread(low: int, high: int) -> Tensor:
        scale = np.exp2(random.integers(low, high, n))
        return torch.from_numpy((random.normal(size=n) * scale).astype(np.float32))

    state = State.of(spread(-20, 3), spread(-20, 3), spread(-40, 3).abs())
    hyper = replace(HYPER, beta1=beta1, beta2=beta2, step=step)
    check_one_step(kernels, state, spread(-20, 3).to(dtype), hyper)


def check_one_step(kernels: Kernels, state: State, grad: Tensor, hyper: AdamW) -> None:
    n = len(grad)
    scaled = grad.float() * hyper.grad_scale
    w, m, v, g = (x.double().numpy() for x in (state.w, state.m, state.v, scaled))
    m_old, m_new = hyper.beta1 * m, (1 - hyper.beta1) * g
    v_old, v_new = hyper.beta2 * v, (1 - hyper.beta2) * g * g
    bias1, bias2 = 1 - hyper.beta1**hyper.step, 1 - hyper.beta2**hyper.step
    denominator = np.sqrt((v_old + v_new) / bias2) + hyper.eps
    updated = w - hyper.lr * (hyper.weight_decay * w + (m_old + m_new) / (bias1 * denominator))
    addends = hyper.lr * (np.abs(m_old) + np.abs(m_new)) / (bias1 * denominator)

    adamw_update(*state, grad, whole(n, hyper), hyper, 2, kernels=kernels)

    m_error = np.abs(state.m.double().numpy() - (m_old + m_new))
    assert (m_error <= 2 * ulp(np.maximum(np.abs(m_old), np.abs(m_new)))).all()
    v_error = np.abs(state.v.double().numpy() - (v_old + v_new))
    assert (v_error <= 2 * ulp(np.maximum(v_old, v_new))).all()
    w_error = np.abs(state.w.double().numpy() - updated)
    assert (w_error <= 2 * ulp(w) + 8 * ulp(addends)).all()


@pytest.mark.parametrize("lr", [1e-3, 1e-5])
def test_a_thousand_steps_stay_with_torch_in_float64(kernels: Kernels, lr: float) -> None:
    n = 500
    make = torch.Generator().manual_seed(0)
    start = torch.randn(n, generator=make) * 0.02
    drift = torch.randn(n, generator=make) * 1e-3
    state = State.of(start, *zeros(n, 2))
    exact = torch.nn.Parameter(start.double())
    optimizer = torch.optim.AdamW([exact], lr=lr, betas=(0.9, 0.999), weight_decay=0.1)
    for step in range(1, 1001):
        grad = (torch.randn(n, generator=make) * 1e-2 + drift).bfloat16()
        hyper = replace(HYPER, lr=lr, step=step)
        adamw_update(*state, grad, whole(n, hyper), hyper, 1, kernels=kernels)
        exact.grad = grad.double()
        optimizer.step()
    update = exact.detach() - start.double()
    error = (state.w.double() - exact.detach()).norm() / update.norm()
    assert error <= 1e-3


def test_a_decay_that_one_minus_it_loses_still_acts(kernels: Kernels) -> None:
    """In FP32, 1 - 1e-8 is 1. Beside other updates such a decay must shrink weights on average."""
    n = 200_000
    hyper = replace(HYPER, lr=1e-6, weight_decay=1e-2)
    weights = 1 + torch.rand(n, generator=torch.Generator().manual_seed(0))
    moments = State.random(n)
    start, grad = State.of(weights, moments.m, moments.v), random_gradient(n)
    with_decay, without = start.clone(), start.clone()
    adamw_update(*with_decay, grad, whole(n, hyper), hyper, 2, kernels=kernels)
    adamw_update(*without, grad, [Segment(0, n, hyper.lr, 0.0)], hyper, 2, kernels=kernels)
    shrinkage = (without.w.double() - with_decay.w.double()).mean() / start.w.double().mean()
    assert shrinkage.item() == pytest.approx(1e-8, rel=0.05)


# Exact rounding: the documented order of operations in exact arithmetic, rounded by hand


def rounded(x: Fraction) -> Fraction:
    """The FP32 value nearest to x, ties to even."""
    if x == 0:
        return x
    exponent = max(math.frexp(float(x))[1] - 24, -149)  # of the last bit that FP32 keeps
    unit = Fraction(2) ** exponent
    result = round(x / unit) * unit  # round() of a Fraction takes ties to even
    assert abs(result) < 2**128
    return result


def fma(a: Fraction, b: Fraction, c: Fraction) -> Fraction:
    return rounded(a * b + c)


def square_root(x: Fraction) -> Fraction:
    return Fraction(float(np.sqrt(np.float32(float(x)))))  # IEEE: correctly rounded


def two_floats(x: float) -> tuple[Fraction, Fraction]:
    high = rounded(Fraction(x))
    return high, rounded(Fraction(x) - high)


def exact_step(
    w: Fraction, m: Fraction, v: Fraction, g: Fraction, hyper: AdamW
) -> tuple[Fraction, Fraction, Fraction]:
    """The order of operations at the head of adamw.cpp."""
    beta1, beta1_lo = two_floats(hyper.beta1)
    comp1, comp1_lo = two_floats(1 - hyper.beta1)
    beta2, beta2_lo = two_floats(hyper.beta2)
    comp2, comp2_lo = two_floats(1 - hyper.beta2)
    inv_sqrt_bias2 = rounded(Fraction((1 - hyper.beta2**hyper.step) ** -0.5))
    step_size = rounded(Fraction(hyper.lr / (1 - hyper.beta1**hyper.step)))
    decay = rounded(Fraction(hyper.lr * hyper.weight_decay))
    g = rounded(g * Fraction(float(np.float32(hyper.grad_scale))))
    m = fma(beta1, m, fma(comp1, g, fma(beta1_lo, m, rounded(comp1_lo * g))))
    p = rounded(comp2 * g)
    r = fma(comp2_lo, g, fma(comp2, g, -p))
    v = fma(beta2, v, fma(p, g, fma(beta2_lo, v, rounded(r * g))))
    d = fma(square_root(v), inv_sqrt_bias2, rounded(Fraction(hyper.eps)))
    w = rounded(w - fma(step_size, rounded(m / d), rounded(decay * w)))
    return w, m, v


@needs_compiler
@given(case=cases())
@settings(max_examples=40)
def test_every_operation_rounds_as_documented(case: tuple[State, Tensor, AdamW]) -> None:
    state, grad, hyper = case
    old = zip(*(map(Fraction, x.tolist()) for x in (state.w, state.m, state.v, grad)), strict=True)
    expected = [exact_step(*element, hyper) for element in old]
    adamw_update(*state, grad, whole(len(grad), hyper), hyper, 1, kernels=compiled())
    found = zip(*(map(Fraction, x.tolist()) for x in (state.w, state.m, state.v)), strict=True)
    assert list(found) == expected


# Independence of threads, chunks, offsets and the calling thread's rounding mode


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@given(
    n=st.integers(1, 700),
    threads=st.integers(1, 5),
    cuts=st.lists(st.integers(0, 700), max_size=4),
    offset=st.integers(0, 70),
)
@settings(max_examples=40)
@needs_compiler
def test_results_do_not_depend_on_the_division_of_work(
    dtype: torch.dtype, n: int, threads: int, cuts: list[int], offset: int
) -> None:
    base, grad = State.random(n + offset), random_gradient(n + offset, dtype)
    start, g = base[slice(offset, None)], grad[offset:]
    one = start.clone()
    adamw_update(*one, g.clone(), whole(n, HYPER), HYPER, 1, kernels=compiled())
    ends = sorted({0, n, *(c for c in cuts if c < n)})
    ranges = list(pairwise(ends))

    segments = start.clone()
    table = [Segment(b, e, HYPER.lr, HYPER.weight_decay) for b, e in ranges]
    adamw_update(*segments, g, table, HYPER, threads, kernels=compiled())
    assert segments.same_bits(one)

    chunks = base.clone()[slice(offset, None)]
    for b, e in ranges:
        part = slice(b, e)
        segment = whole(e - b, HYPER)
        adamw_update(*chunks[part], g[part], segment, HYPER, threads, kernels=compiled())
    assert chunks.same_bits(one)


@needs_compiler
def test_many_elements_on_many_threads() -> None:
    n = 200_003
    start, grad = State.random(n), random_gradient(n)
    results = []
    for threads in (1, 2, 7):
        state = start.clone()
        adamw_update(*state, grad, whole(n, HYPER), HYPER, threads, kernels=compiled())
        results.append(state)
    assert results[1].same_bits(results[0])
    assert results[2].same_bits(results[0])
    assert not results[0].same_bits(start)


@needs_compiler
def test_subnormals_survive_a_caller_that_flushes_them() -> None:
    n = 4_000
    start = State.of(torch.zeros(n), torch.full((n,), 1e-39), torch.full((n,), 1e-42))
    grad = torch.full((n,), 1e-21)
    expected, state = start.clone(), start.clone()
    adamw_update(*expected, grad, whole(n, HYPER), HYPER, 2, kernels=compiled())
    assert (expected.v > 0).all()
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        adamw_update(*state, grad, whole(n, HYPER), HYPER, 2, kernels=compiled())
        still_flushes = not (torch.tensor([1e-39]) * 1.0).any()
    finally:
        torch.set_flush_denormal(False)
    assert state.same_bits(expected)
    assert still_flushes


# Segments


def test_each_segment_has_its_own_rates_and_the_rest_is_untouched(kernels: Kernels) -> None:
    n = 500
    start, grad = State.random(n), random_gradient(n)
    state = start.clone()
    segments = [Segment(0, 100, 1e-3, 0.1), Segment(130, 130, 1.0, 0.0), Segment(200, 321, 5e-3, 0)]
    adamw_update(*state, grad, segments, HYPER, 2, kernels=kernels)
    for begin, end, lr, weight_decay in ((0, 100, 1e-3, 0.1), (200, 321, 5e-3, 0.0)):
        part = slice(begin, end)
        alone = start[part].clone()
        hyper = replace(HYPER, lr=lr, weight_decay=weight_decay)
        segment = whole(end - begin, hyper)
        adamw_update(*alone, grad[part], segment, hyper, 1, kernels=kernels)
        assert state[part].same_bits(alone)
    for part in (slice(100, 200), slice(321, n)):
        assert state[part].same_bits(start[part])
    assert not state[slice(0, 100)].same_bits(start[slice(0, 100)])


def test_no_segments_is_no_update(kernels: Kernels) -> None:
    start = State.random(10)
    state = start.clone()
    adamw_update(*state, random_gradient(10), [], HYPER, 1, kernels=kernels)
    assert state.same_bits(start)


def test_zero_padding_stays_zero(kernels: Kernels) -> None:
    n = 77
    state = State.of(*zeros(n, 3))
    before = state.clone()
    adamw_update(*state, torch.zeros(n).bfloat16(), whole(n, HYPER), HYPER, 1, kernels=kernels)
    assert state.same_bits(before)


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x7FC00000])
def test_a_nan_gradient_spoils_its_element_alone(kernels: Kernels, bits: int) -> None:
    """Whatever the NaN's payload, which rounding to BF16 by the bits would turn into numbers."""
    n = 100
    grad = random_gradient(n, torch.float32)
    clean, state = State.random(n), State.random(n)
    adamw_update(*clean, grad, whole(n, HYPER), HYPER, 1, kernels=kernels)
    grad[40:41] = torch.from_numpy(np.array([bits], dtype=np.uint32).view(np.float32))
    adamw_update(*state, grad, whole(n, HYPER), HYPER, 1, kernels=kernels)
    assert (state.hi[40], state.lo[40]) == (0x7FC0, 0)
    for part in (slice(0, 40), slice(41, n)):
        assert state[part].same_bits(clean[part])


# Rows of a matrix


@dataclass
class Rows:
    """A matrix's state and gradients for some of its rows."""

    state: State
    rows: Tensor
    starts: Tensor
    order: Tensor
    dx: Tensor
    dense_grad: Tensor | None

    @property
    def hidden(self) -> int:
        return self.dx.shape[1]

    def gradient(self, u: int) -> np.ndarray:
        """The gradient of the u-th listed row: a plain sum in FP32, one addend after another."""
        total = np.zeros(self.hidden, dtype=np.float32)
        if self.dense_grad is not None:
            total = self.dense_grad.float().numpy().reshape(-1, self.hidden)[self.rows[u]].copy()
        for k in range(int(self.starts[u]), int(self.starts[u + 1])):
            total = total + self.dx[self.order[k]].float().numpy()
        return total

    def run(self, kernels: Kernels, state: State, threads: int = 2) -> float:
        table = (self.rows, self.starts, self.order, self.dx, self.dense_grad)
        return adamw_rows(*state, *table, HYPER, threads, kernels=kernels)


def make_rows(
    height: int, hidden: int, counts: list[int], dx_type: torch.dtype, dense: torch.dtype | None
) -> Rows:
    """``counts[u]`` rows of dx for the u-th of ``len(counts)`` random rows."""
    make = torch.Generator().manual_seed(3)
    total = sum(counts)
    rows = torch.randperm(height, generator=make)[: len(counts)].sort().values
    return Rows(
        State.random(height * hidden),
        rows,
        torch.tensor([0, *np.cumsum(counts, dtype=np.int64)]),
        torch.randperm(total, generator=make),
        random_gradient(total * hidden, dx_type).view(total, hidden),
        None if dense is None else random_gradient(height * hidden, dense, seed=2),
    )


FLOATS = [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("dense", [None, *FLOATS])
@pytest.mark.parametrize("dx_type", FLOATS)
@pytest.mark.parametrize("hidden", [5, 1100])
def test_rows_get_the_dense_update_of_their_summed_gradient(
    kernels: Kernels, dx_type: torch.dtype, dense: torch.dtype | None, hidden: int
) -> None:
    case = make_rows(9, hidden, [1, 0, 4, 2], dx_type, dense)
    expected, state = case.state.clone(), case.state.clone()
    squares = 0.0
    for u, row in enumerate(case.rows.tolist()):
        part = slice(row * hidden, (row + 1) * hidden)
        grad = case.gradient(u)
        squares += float(np.square(grad.astype(np.float64)).sum())
        segment = whole(hidden, HYPER)
        grad_row = torch.from_numpy(grad)
        adamw_update(*expected[part], grad_row, segment, HYPER, 1, kernels=kernels)
    found = case.run(kernels, state)
    assert state.same_bits(expected)
    assert found == pytest.approx(squares, rel=1e-12)
    assert not state.same_bits(case.state)


@pytest.mark.parametrize("dense", [None, *FLOATS])
@pytest.mark.parametrize("dx_type", FLOATS)
def test_scaled_gradients_of_rows_are_those_of_a_dense_update(
    kernels: Kernels, dx_type: torch.dtype, dense: torch.dtype | None
) -> None:
    case = make_rows(9, 70, [1, 0, 4, 2], dx_type, dense)
    scaled = replace(HYPER, grad_scale=0.3)
    expected, state = case.state.clone(), case.state.clone()
    for u, row in enumerate(case.rows.tolist()):
        part = slice(row * 70, (row + 1) * 70)
        gradient = torch.from_numpy(case.gradient(u)) * 0.3
        adamw_update(*expected[part], gradient, whole(70, HYPER), HYPER, 1, kernels=kernels)
    table = (case.rows, case.starts, case.order, case.dx, case.dense_grad)
    found = adamw_rows(*state, *table, scaled, 2, kernels=kernels)
    assert state.same_bits(expected)
    assert found == case.run(kernels, case.state.clone()), "it is that of the gradients as given"


@pytest.mark.parametrize("dense", [None, *FLOATS])
@pytest.mark.parametrize("dx_type", FLOATS)
def test_squares_of_rows_before_an_update(
    kernels: Kernels, dx_type: torch.dtype, dense: torch.dtype | None
) -> None:
    case = make_rows(9, 1100, [1, 0, 4, 2], dx_type, dense)
    table = (case.rows, case.starts, case.order, case.dx, case.dense_grad)
    found = torch.empty(len(case.rows), dtype=torch.float64)
    row_squares(9, *table, found, 2, kernels=kernels)
    exact = [float(np.square(case.gradient(u).astype(np.float64)).sum()) for u in range(len(found))]
    assert found.tolist() == pytest.approx(exact, rel=1e-12)
    case.dx[int(case.order[0]), 3] = math.inf
    row_squares(9, *table, found, 2, kernels=kernels)
    assert found.isfinite().tolist() == [False, True, True, True]
    with pytest.raises(ValueError, match="rows must ascend"):
        row_squares(9, case.rows.flip(0), *table[1:], found, 2, kernels=kernels)
    with pytest.raises(TypeError, match="out is"):
        row_squares(9, *table, found.float(), 2, kernels=kernels)


@pytest.mark.parametrize("dense", [None, torch.bfloat16])
def test_rows_without_dx(kernels: Kernels, dense: torch.dtype | None) -> None:
    """The rest of the matrix: dense gradients alone, or none, which still decays."""
    case = make_rows(6, 8, [0, 0, 0], torch.bfloat16, dense)
    assert case.order.numel() == 0
    state = case.state.clone()
    squares = case.run(kernels, state)
    assert (squares > 0) == (dense is not None)
    expected = case.state.clone()
    for u, row in enumerate(case.rows.tolist()):
        part = slice(row * 8, (row + 1) * 8)
        grad = torch.from_numpy(case.gradient(u))
        adamw_update(*expected[part], grad, whole(8, HYPER), HYPER, 1, kernels=kernels)
    assert state.same_bits(expected)


def test_no_rows(kernels: Kernels) -> None:
    case = make_rows(6, 8, [], torch.bfloat16, torch.bfloat16)
    state = case.state.clone()
    assert case.run(kernels, state) == 0.0
    assert state.same_bits(case.state)


def test_gradient_rows_are_added_in_the_order_given(kernels: Kernels) -> None:
    """In FP32, 1 + 1e8 - 1e8 is 0 and 1e8 - 1e8 + 1 is 1."""
    dx = torch.tensor([[1.0], [1e8], [-1e8]])
    starts = torch.tensor([0, 3])
    sums = []
    for order in ([0, 1, 2], [1, 2, 0]):
        state = State.random(1)
        case = Rows(state, torch.tensor([0]), starts, torch.tensor(order), dx, None)
        sums.append(case.run(kernels, state))
    assert sums == [0.0, 1.0]


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("place", ["dx", "dense"])
def test_rows_with_a_gradient_that_is_not_finite_write_nothing(
    kernels: Kernels, bad: float, place: str
) -> None:
    case = make_rows(20, 1030, [2] * 10, torch.bfloat16, torch.float32)
    assert case.dense_grad is not None
    if place == "dx":
        case.dx[-1, -1] = bad
    else:
        case.dense_grad[int(case.rows[-1]) * 1030 + 1029] = bad
    state = case.state.clone()
    assert math.isnan(case.run(kernels, state))
    assert state.same_bits(case.state)


def test_a_sum_that_overflows_writes_nothing(kernels: Kernels) -> None:
    dx = torch.full((2, 3), 3e38)
    state = State.random(3)
    before = state.clone()
    case = Rows(state, torch.tensor([0]), torch.tensor([0, 2]), torch.tensor([0, 1]), dx, None)
    assert math.isnan(case.run(kernels, state))
    assert state.same_bits(before)


def test_gradients_of_rows_that_are_not_listed_do_not_matter(kernels: Kernels) -> None:
    case = make_rows(9, 5, [1, 2], torch.float32, torch.float32)
    assert case.dense_grad is not None
    unlisted = next(r for r in range(9) if r not in case.rows.tolist())
    case.dense_grad[unlisted * 5] = math.nan
    state = case.state.clone()
    assert math.isfinite(case.run(kernels, state))
    part = slice(unlisted * 5, unlisted * 5 + 5)
    assert state[part].same_bits(case.state[part])


@needs_compiler
def test_rows_do_not_depend_on_threads() -> None:
    counts = [300, *np.random.default_rng(0).integers(0, 4, 60).tolist()]
    case = make_rows(90, 130, counts, torch.bfloat16, None)
    results = []
    for threads in (1, 2, 6):
        state = case.state.clone()
        results.append((case.run(compiled(), state, threads), state))
    for squares, state in results[1:]:
        assert squares == results[0][0]
        assert state.same_bits(results[0][1])


# Refusals


def test_wrong_arguments_are_refused(kernels: Kernels) -> None:
    state, grad = State.random(8), random_gradient(8)
    segments = whole(8, HYPER)

    def update(
        state: State = state,
        grad: Tensor = grad,
        segments: list[Segment] = segments,
        threads: int = 1,
    ) -> None:
        adamw_update(*state, grad, segments, HYPER, threads, kernels=kernels)

    before = state.clone()
    with pytest.raises(TypeError, match="grad is"):
        update(grad=grad.half())
    with pytest.raises(TypeError, match="m is"):
        update(state=State(state.hi, state.lo, state.m.double(), state.v))
    with pytest.raises(ValueError, match="lo has shape"):
        update(state=State(state.hi, state.lo[:7], state.m, state.v))
    with pytest.raises(ValueError, match="strides"):
        update(grad=random_gradient(16)[::2])
    with pytest.raises(ValueError, match="one dimension"):
        update(grad=grad.view(2, 4))
    with pytest.raises(ValueError, match="on the CPU"):
        update(grad=grad.to("meta"))
    with pytest.raises(ValueError, match="threads is 0"):
        update(threads=0)
    for bad in ([(0, 9)], [(-1, 4)], [(4, 3)], [(0, 5), (4, 8)], [(4, 8), (0, 4)]):
        with pytest.raises(ValueError, match="Segment"):
            update(segments=[Segment(b, e, 1e-3, 0.0) for b, e in bad])
    assert state.same_bits(before)


def test_wrong_row_tables_are_refused(kernels: Kernels) -> None:
    good = make_rows(4, 3, [1, 2], torch.bfloat16, torch.bfloat16)
    before = good.state.clone()
    one, two = torch.tensor([1, 1]), torch.tensor([2, 1])
    bad = {
        "rows must ascend": [{"rows": one}, {"rows": two}, {"rows": torch.tensor([0, 4])}],
        "starts must go": [
            {"starts": torch.tensor([1, 2, 3])},
            {"starts": torch.tensor([0, 2, 2])},
            {"starts": torch.tensor([0, 5, 3])},
        ],
        "order must lie": [
            {"order": torch.tensor([0, 1, 3])},
            {"order": torch.tensor([0, -1, 2])},
        ],
        "starts has shape": [{"starts": torch.tensor([0, 3])}],
        "dx has shape": [{"dx": good.dx[:, :2].reshape(-1)}, {"dx": torch.zeros(3, 5)}],
        "dense_grad has shape": [{"dense_grad": torch.zeros(11)}],
    }
    for message, changes in bad.items():
        for change in changes:
            case = replace(good, **change)
            with pytest.raises(ValueError, match=message):
                case.run(kernels, case.state)
    with pytest.raises(TypeError, match="rows is"):
        replace(good, rows=good.rows.int()).run(kernels, good.state)
    assert good.state.same_bits(before)


@pytest.mark.parametrize(
    "change",
    [
        {"beta1": 1.0},
        {"beta2": -0.1},
        {"eps": 0.0},
        {"eps": math.nan},
        {"lr": -1.0},
        {"lr": math.inf},
        {"weight_decay": math.nan},
        {"step": 0},
        {"grad_scale": -1.0},
        {"grad_scale": math.nan},
    ],
)
def test_wrong_settings_are_refused(change: dict[str, float]) -> None:
    (name,) = change
    with pytest.raises(ValueError, match=name):
        replace(HYPER, **change)


# The rest


@pytest.mark.parametrize("n", [0, 1, 1000, 100_003])
def test_stream_rmw_reads_and_writes_all_three(kernels: Kernels, n: int) -> None:
    arrays = [torch.full((n,), float(i)) for i in range(3)]
    stream_rmw(arrays[0], arrays[1], arrays[2], 3, kernels=kernels)
    for i, array in enumerate(arrays):
        assert torch.equal(array, torch.full((n,), 1.0 - i))


@pytest.mark.parametrize("n", [0, 1, 15, 1000, 1_000_003])
@pytest.mark.parametrize("shift", [0, 1, 9])
def test_stream_copy_copies_all_and_nothing_else(kernels: Kernels, n: int, shift: int) -> None:
    source = torch.randint(0, 256, (n + 20,), dtype=torch.uint8)
    target = torch.zeros_like(source)
    stream_copy(target[shift : shift + n], source[20 - shift :][:n], 3, kernels=kernels)
    assert torch.equal(target[shift : shift + n], source[20 - shift :][:n])
    assert not target[:shift].any()
    assert not target[shift + n :].any()


def test_the_fallback_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(adamw_library, "find_compiler", lambda: None)
    adamw_library._cached_kernels.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            state = State.random(4)
            for _ in range(2):
                adamw_update(*state, random_gradient(4), whole(4, HYPER), HYPER, 1)
            assert kernel_build() == "torch-fallback"
    finally:
        adamw_library._cached_kernels.cache_clear()
    (message,) = caplog.messages
    for word in ("plain PyTorch", "times slower", "g++", "no C++ compiler"):
        assert word in message


@needs_compiler
def test_the_build_names_source_processor_and_compiler() -> None:
    build = load_kernels("g++").build
    assert build == load_kernels("g++").build
    for word in ("adamw.cpp", "CPU", "g++"):
        assert word in build
