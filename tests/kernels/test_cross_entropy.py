"""Chunked cross-entropy against torch's own on float64 logits."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from slideformer.kernels.cross_entropy import (
    PLAIN,
    LossForm,
    lse_accumulate,
    lse_finish,
    lse_init,
    softmax_grad_,
    token_losses,
)

Close = Callable[..., None]


FORMS: list[dict[str, float]] = [
    {},
    {"softcap": 5.0},
    {"smoothing": 0.1},
    {"z_loss": 0.01},
    {"softcap": 5.0, "smoothing": 0.3, "z_loss": 0.1},
]


def sample(
    tokens: int, vocabulary: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Logits and targets, every third of which is ignored."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits = 4 * torch.randn((tokens, vocabulary), generator=generator)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    targets[1::3] = -100
    targets[0], targets[-1] = 0, vocabulary - 1
    return logits.to(device, dtype), targets.to(device)


def capped(logits: Tensor, form: LossForm) -> Tensor:
    return logits if form.softcap is None else form.softcap * torch.tanh(logits / form.softcap)


def chunked(
    logits: Tensor, targets: Tensor, bounds: list[int], form: LossForm = PLAIN
) -> tuple[Tensor, Tensor]:
    """``lse`` and losses, the vocabulary cut at ``bounds``."""
    state = lse_init(logits.shape[0], logits.device)
    edges = [0, *bounds, logits.shape[1]]
    for start, stop in itertools.pairwise(edges):
        lse_accumulate(logits[:, start:stop], targets, start, *state, form)
    running_max, running_sum, target_logit = state
    lse = lse_finish(running_max, running_sum)
    return lse, token_losses(lse, target_logit, targets, form)


# The long one needs several rounds of the running maximum, and several gradient programs a row.
@pytest.mark.parametrize("options", FORMS, ids=str)
@pytest.mark.parametrize(
    ("tokens", "vocabulary", "bounds"),
    [(5, 123, []), (7, 41, [1, 20]), (4, 9001, []), (3, 2560, [1024, 2048])],
    ids=str,
)
def test_losses_and_gradients(
    tokens: int,
    vocabulary: int,
    bounds: list[int],
    options: dict[str, float],
    dtype: torch.dtype,
    device: torch.device,
    close: Close,
) -> None:
    logits, targets = sample(tokens, vocabulary, dtype, device)
    wide = logits.double().requires_grad_()
    form = LossForm(**options, vocabulary=vocabulary)
    smoothing = form.smoothing or 0.0
    bare = capped(wide, form)
    expected = F.cross_entropy(bare, targets, reduction="none", label_smoothing=smoothing)
    squares = (form.z_loss or 0.0) * bare.logsumexp(-1).square()
    expected = expected + torch.where(targets == -100, 0.0, squares)
    scale = 0.375
    (expected_grad,) = torch.autograd.grad(scale * expected.sum(), wide)

    lse, losses = chunked(logits, targets, bounds, form)

    assert lse.dtype == losses.dtype == torch.float32
    close(lse, capped(wide, form).detach().logsumexp(-1))
    close(losses, expected.detach())
    assert losses[1] == 0

    edges = [0, *bounds, vocabulary]
    for start, stop in itertools.pairwise(edges):
        softmax_grad_(logits[:, start:stop], targets, start, lse, scale, form)

    close(logits, expected_grad)


def test_rows_without_loss_become_zero(device: torch.device) -> None:
    logits, targets = sample(5, 33, torch.bfloat16, device)
    logits[1] = float("nan")
    lse, losses = chunked(logits, targets, [])
    softmax_grad_(logits, targets, 0, lse, 1.0)
    assert targets[1] == -100
    assert losses[1] == 0
    assert torch.equal(logits[1], torch.zeros_like(logits[1]))
    assert bool(logits.isfinite().all())


def test_a_broken_logit_shows(device: torch.device) -> None:
    logits, targets = sample(4, 2000, torch.float32, device)
    logits[2, 1500] = float("nan")
    _, losses = chunked(logits, targets, [512])
    assert losses.isnan().tolist() == [False, False, True, False]


@pytest.mark.parametrize("bounds", [[], [10]], ids=["one", "two"])
def test_masked_and_extreme_logits(bounds: list[int], device: torch.device) -> None:
    # In two chunks, one of each row is masked as a whole: the last of row 0, the first of row 1.
    logits = torch.full((2, 70), float("-inf"), device=device)
    logits[0, 3], logits[0, 5] = 3000.0, 3000.0
    logits[1, 69] = -3000.0
    targets = torch.tensor([5, 69], device=device)
    lse, losses = chunked(logits, targets, bounds)
    torch.testing.assert_close(losses.cpu(), torch.tensor([2.0, 1.0]).log(), rtol=1e-4, atol=3e-4)
    softmax_grad_(logits, targets, 0, lse, 1.0)
    assert logits[0, 3].item() == pytest.approx(0.5, abs=1e-3)
    assert logits[1].abs().max().item() < 1e-3


@given(
    st.integers(2, 60).flatmap(
        lambda n: st.tuples(st.just(n), st.sets(st.integers(1, n - 1), max_size=6))
    )
)
def test_chunking_does_not_change_the_loss(case: tuple[int, set[int]]) -> None:
    vocabulary, cuts = case
    logits, targets = sample(6, vocabulary, torch.float32, torch.device("cpu"))
    lse, losses = chunked(logits, targets, sorted(cuts))
    torch.testing.assert_close(losses, F.cross_entropy(logits, targets, reduction="none"))
    grad = softmax_grad_(logits, targets, 0, lse, 1.0)
    # Softmax and one-hot both add up to 1.
    torch.testing.assert_close(grad.sum(-1), torch.zeros(6), rtol=0, atol=1e-5)


@pytest.mark.gpu
def test_more_elements_than_32_bits_count() -> None:
    tokens, vocabulary = 17_000, 128_256
    logits = torch.randn(vocabulary, device="cuda", dtype=torch.bfloat16).repeat(tokens, 1)
    assert logits.numel() > 2**31
    logits[-1] *= 0.5
    targets = torch.full((tokens,), vocabulary - 1, device="cuda")
    tail = logits[-2:].clone()
    lse, losses = chunked(logits, targets, [])
    tail_lse, tail_losses = chunked(tail, targets[-2:], [])
    assert torch.equal(lse[-2:], tail_lse)
    assert torch.equal(losses[-2:], tail_losses)
    softmax_grad_(logits, targets, 0, lse, 1.0)
    assert torch.equal(logits[-2:], softmax_grad_(tail, targets[-2:], 0, tail_lse, 1.0))


def test_refused() -> None:
    state = lse_init(3)
    targets = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"logits of shape \(3, 4, 1\)"):
        lse_accumulate(torch.ones(3, 4, 1), targets, 0, *state)
    with pytest.raises(ValueError, match="contiguous in the last dimension"):
        softmax_grad_(torch.ones(4, 3).t(), targets, 0, state[0], 1.0)
    with pytest.raises(ValueError, match=r"shape \(3,\) for 4 tokens"):
        softmax_grad_(torch.ones(4, 8), targets, 0, state[0], 1.0)
