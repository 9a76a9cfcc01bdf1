"""AdamW with moments of 8 bits: the codes, the formula, the same bits by threads and segments."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slideformer.kernels.adamw import AdamW, Segment
from slideformer.kernels.adamw8 import adamw8_update
from slideformer.kernels.adamw_library import Kernels, default_kernels
from slideformer.kernels.quantise import (
    BLOCK,
    FIRST,
    SECOND,
    block_count,
    decode,
    encode,
    rounding_noise,
)
from slideformer.kernels.split import join_master, split_master

HYPER = AdamW(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, step=3)
N = 5000
NEAREST = 1 << 19
PLAIN = Kernels(None, "none")
State = list[Tensor]
TOPS = pytest.mark.parametrize("top", [FIRST, SECOND])


def state(seed: int = 0, n: int = N) -> State:
    """Master, codes of moments as in training, some of them zero, and their scales."""
    make = torch.Generator().manual_seed(seed)
    hi, lo = torch.empty(2, n, dtype=torch.int16)
    split_master(torch.randn(n, generator=make) * 0.02, hi, lo)
    m, v = torch.randn(n, generator=make) * 1e-3, torch.randn(n, generator=make).square() * 1e-6
    m[::7] = v[::7] = 0.0
    nearest = torch.full((n,), NEAREST, dtype=torch.int32)
    (m, first), (v, second) = encode(m, nearest, FIRST), encode(v, nearest, SECOND)
    return [hi, lo, m, v, torch.stack([first, second], 1).view(-1)]


def gradient(seed: int = 1, n: int = N, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    found = torch.randn(n, generator=torch.Generator().manual_seed(seed)) * 1e-3
    found[::14] = 0.0
    return found.to(dtype)


def weights(of: State) -> Tensor:
    out = torch.empty(len(of[0]))
    join_master(of[0], of[1], out)
    return out


def moments(of: State) -> tuple[Tensor, Tensor]:
    scales = of[4].view(-1, 2)
    return decode(of[2], scales[:, 0], FIRST), decode(of[3], scales[:, 1], SECOND)


def copies(of: State) -> State:
    return [x.clone() for x in of]


def whole(n: int = N) -> list[Segment]:
    return [Segment(0, n, HYPER.lr, HYPER.weight_decay)]


def different(one: State, other: State) -> list[int]:
    return [
        i
        for i, (x, y) in enumerate(zip(one, other, strict=True))
        if not torch.equal(x.view(torch.uint8), y.view(torch.uint8))
    ]


# Codes


@TOPS
@pytest.mark.parametrize("noise", [0, NEAREST, (1 << 20) - 1])
def test_a_code_that_is_read_and_written_again_stays(noise: int, top: int) -> None:
    codes = torch.arange(256).to(torch.uint8)
    codes[BLOCK - 1] = top  # so that the scales stay too
    scales = torch.tensor([1.0, 2.0**-60])
    values = decode(codes, scales, top)
    found, again = encode(values, torch.full((256,), noise, dtype=torch.int32), top)
    assert torch.equal(found, codes)
    assert torch.equal(again, scales)
    assert torch.equal(values[BLOCK - 1 :: BLOCK].abs(), scales), "the highest stands for 1"


@TOPS
def test_codes_cover_the_range_with_eight_steps_to_a_power_of_two(top: int) -> None:
    found = decode(torch.arange(1, top + 1).to(torch.uint8), torch.ones(2), top).double()
    ratios = found[1:] / found[:-1]
    assert float(found[-1]) == 1.0
    assert float(found[0]) == 1.25 * 2.0 ** (-16 if top == FIRST else -32)
    assert ((ratios > 1.06) & (ratios <= 1.125)).all()
    torch.testing.assert_close(found[8:], 2 * found[:-8], rtol=0, atol=0)


@TOPS
def test_rounding_is_to_a_neighbour_and_right_on_average(top: int) -> None:
    make = torch.Generator().manual_seed(0)
    values = torch.rand(BLOCK, generator=make) + 0.01
    values[0], values[5] = 2.0, 0.0
    if top == FIRST:
        values[1::2] *= -1
    total, draws = torch.zeros(BLOCK, dtype=torch.float64), 2000
    for _ in range(draws):
        noise = torch.randint(0, 1 << 20, (BLOCK,), generator=make).to(torch.int32)
        found = decode(*encode(values, noise, top), top)
        assert ((found - values).abs() <= 0.126 * values.abs()).all()
        total += found
    # The error of a draw is below an eighth; that of a mean, five standard errors at most.
    off = (total / draws - values).abs()
    assert (off <= 5 * 0.0625 / math.sqrt(draws) * values.abs()).all()


def test_noise_is_even_and_follows_master_and_gradient() -> None:
    n = 100_000
    make = torch.Generator().manual_seed(0)
    lo = torch.randint(-(2**15), 2**15, (n,), generator=make).to(torch.int16)
    grad = (torch.randn(n, generator=make) * 1e-3).bfloat16()
    for found in (
        rounding_noise(lo, grad),
        rounding_noise(torch.zeros_like(lo), grad.float() + torch.rand(n, generator=make) * 1e-5),
        rounding_noise(lo, torch.zeros(n)),
    ):
        assert found.min() >= 0
        counts = torch.histc(found.float(), 16, 0, 1 << 20)
        assert ((counts - n / 16).abs() < 6 * math.sqrt(n / 16)).all(), counts


# Updates


def reference(before: State, grad: Tensor, hyper: AdamW) -> tuple[Tensor, Tensor, Tensor]:
    """Weights and moments after a step by the formula in FP64, the moments not yet rounded."""
    m, v = (x.double() for x in moments(before))
    g, w = grad.double() * hyper.grad_scale, weights(before).double()
    m = hyper.beta1 * m + (1 - hyper.beta1) * g
    v = hyper.beta2 * v + (1 - hyper.beta2) * g * g
    bias1, bias2 = 1 - hyper.beta1**hyper.step, 1 - hyper.beta2**hyper.step
    w = w * (1 - hyper.lr * hyper.weight_decay)
    return w - hyper.lr * (m / bias1) / ((v / bias2).sqrt() + hyper.eps), m, v


@pytest.mark.parametrize("kernels", [None, PLAIN], ids=["compiled", "plain"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_step_is_adamw_but_for_the_codes(dtype: torch.dtype, kernels: Kernels | None) -> None:
    before, grad = state(), gradient(dtype=dtype)
    hyper = replace(HYPER, grad_scale=0.5)
    after = copies(before)
    adamw8_update(*after, grad, whole(), hyper, 1, kernels=kernels)
    w, m, v = reference(before, grad, hyper)
    torch.testing.assert_close(weights(after).double(), w, rtol=1e-6, atol=2e-9)
    least = after[4].view(-1, 2)[:, 0].repeat_interleave(BLOCK)[:N] * 2.0**-15
    for found, expected in zip(moments(after), (m, v), strict=True):
        assert ((found - expected).abs() <= 0.126 * expected.abs() + least).all()
    for i, values in enumerate((m, v)):
        padded = torch.zeros(block_count(N) * BLOCK, dtype=torch.float64)
        padded[:N] = values.abs()
        largest = padded.view(-1, BLOCK).amax(1)
        torch.testing.assert_close(after[4][i::2].double(), largest, rtol=3e-7, atol=0.0)


def test_the_compiled_kernel_and_the_plain_one_agree() -> None:
    """In all codes but a few: they round differently by some ulps before the noise is added."""
    assert default_kernels().library is not None
    before, grad = state(), gradient()
    one, other = copies(before), copies(before)
    adamw8_update(*one, grad, whole(), HYPER, 1)
    adamw8_update(*other, grad, whole(), HYPER, 1, kernels=PLAIN)
    for i in (2, 3):
        assert (one[i] != other[i]).sum() <= 5
        assert (one[i] != before[i]).sum() > N / 10
    torch.testing.assert_close(weights(one), weights(other), rtol=1e-6, atol=1e-9)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_threads_and_chunks_at_blocks_change_no_bit(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 1200))
    before, grad = state(n=n), gradient(n=n)
    cuts = sorted(data.draw(st.sets(st.integers(0, n), max_size=4)))
    segments = [
        Segment(a, b, 1e-3 * (i + 1), 0.1 * i) for i, (a, b) in enumerate(pairwise([0, *cuts, n]))
    ]
    if len(segments) > 1:
        segments.pop(data.draw(st.integers(0, len(segments) - 1)))
    expected, found = copies(before), copies(before)
    adamw8_update(*expected, grad, segments, HYPER, 1)
    chunks = sorted(data.draw(st.sets(st.integers(0, (n - 1) // BLOCK), max_size=4)) | {0})
    for begin, end in pairwise([*(BLOCK * c for c in chunks), n]):
        inside = [
            replace(s, begin=max(s.begin, begin) - begin, end=min(s.end, end) - begin)
            for s in segments
            if s.begin < end and begin < s.end
        ]
        part = [x[begin:end] for x in found[:4]]
        scales = found[4][2 * (begin // BLOCK) : 2 * block_count(end)]
        threads = data.draw(st.integers(1, 3))
        adamw8_update(*part, scales, grad[begin:end], inside, HYPER, threads)
    assert different(found, expected) == []
    covered = torch.zeros(n, dtype=torch.bool)
    for s in segments:
        covered[s.begin : s.end] = True
    assert torch.equal(found[0][~covered], before[0][~covered])
    assert torch.equal(found[1][~covered], before[1][~covered])


def test_blocks_outside_the_segments_are_untouched() -> None:
    before = state()
    after = copies(before)
    adamw8_update(*after, gradient(), [Segment(BLOCK, 2 * BLOCK, 1e-3, 0.1)], HYPER, 2)
    for i in range(4):
        changed = (after[i] != before[i]).nonzero().view(-1)
        assert changed.min() >= BLOCK
        assert changed.max() < 2 * BLOCK
    assert (after[4] != before[4]).nonzero().view(-1).tolist() == [2, 3]


@pytest.mark.parametrize("kernels", [None, PLAIN], ids=["compiled", "plain"])
def test_zeros_stay_zero_and_others_of_their_block_are_kept(kernels: Kernels | None) -> None:
    """As of frozen parameters and padding beside those that are trained."""
    before = state()
    for x in before[:4]:
        x[64:100] = 0
    after = copies(before)
    segments = [Segment(0, 64, 1e-3, 0.1), Segment(100, N, 1e-3, 0.1)]
    grad = gradient()
    grad[64:100] = 0.0
    adamw8_update(*after, grad, segments, HYPER, 1, kernels=kernels)
    for x in after[:4]:
        assert not x[64:100].any()


@pytest.mark.parametrize("kernels", [None, PLAIN], ids=["compiled", "plain"])
def test_what_is_not_finite_spoils_its_weight_and_its_block_alone(kernels: Kernels | None) -> None:
    before, grad = state(), gradient(dtype=torch.float32)
    plain, grad_before = copies(before), grad.clone()
    adamw8_update(*plain, grad_before, whole(), HYPER, 1, kernels=kernels)
    grad[BLOCK + 5] = 1e21  # its square is infinite
    grad[3 * BLOCK] = math.nan
    after = copies(before)
    adamw8_update(*after, grad, whole(), HYPER, 1, kernels=kernels)
    assert weights(after).isnan().nonzero().tolist() == [[3 * BLOCK]]
    for x in moments(after):
        assert x.isfinite().all()
    others = torch.ones(N, dtype=torch.bool)
    others[BLOCK : 2 * BLOCK] = others[3 * BLOCK : 4 * BLOCK] = False
    for i in range(4):
        assert torch.equal(after[i][others], plain[i][others])


def test_second_moments_follow_gradients_that_become_smaller() -> None:
    """Within a block beside others that do not; rounded to the nearest, they would stay."""
    n, half = 16 * BLOCK, slice(None, None, 2)
    make = torch.Generator().manual_seed(0)
    following = [torch.zeros_like(x) for x in state(n=n)]
    size, exact = torch.full((n,), 1e-3), torch.zeros(n, dtype=torch.float64)
    for step in range(1, 2001):
        if step == 300:
            size[half] = 1e-4
        grad = torch.randn(n, generator=make) * size
        exact = 0.999 * exact + 0.001 * grad.double().square()
        adamw8_update(*following, grad, whole(n), replace(HYPER, step=step), 1)
    found = moments(following)[1]
    for part in (half, slice(1, None, 2)):
        assert float(found[part].mean()) == pytest.approx(float(exact[part].mean()), rel=0.05)
    error = (found / exact - 1).square().mean().sqrt()
    assert error < 0.4, "of single ones"


@pytest.mark.parametrize(
    ("index", "change", "error", "message"),
    [
        (2, lambda x: x.float(), TypeError, "m is torch.float32"),
        (3, lambda x: x[:-1], ValueError, "v has shape"),
        (4, lambda x: x[:-1], ValueError, "scales has shape"),
        (1, lambda x: x[::2], ValueError, "lo has shape"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    index: int, change: object, error: type[Exception], message: str
) -> None:
    arguments = state()
    arguments[index] = change(arguments[index])  # type: ignore[operator]
    with pytest.raises(error, match=message):
        adamw8_update(*arguments, gradient(), whole(), HYPER, 1)
    with pytest.raises(ValueError, match="overlaps the one before or leaves"):
        adamw8_update(*state(), gradient(), whole(N + 1), HYPER, 1)
