"""The tiled head against ``torch.nn.functional.cross_entropy`` on full logits."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from slideformer.kernels.cross_entropy import PLAIN, LossForm
from slideformer.models.head import (
    HeadStats,
    head_grad,
    head_loss,
    head_loss_and_grad,
    head_stats,
)
from slideformer.models.workspace import head_workspace_bytes

CPU = torch.device("cpu")
LOSS_START = 3.0  # what earlier micro-batches left in the loss


def ideal_losses(logits: Tensor, targets: Tensor, form: LossForm) -> Tensor:
    """What PyTorch makes of full logits."""
    if form.softcap is not None:
        logits = form.softcap * torch.tanh(logits / form.softcap)
    smoothing = form.smoothing or 0.0
    losses = F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
    squares = (form.z_loss or 0.0) * logits.logsumexp(-1).square()
    return losses + torch.where(targets == -100, 0.0, squares)


class Problem:
    """Random inputs, and what autograd makes of them in FP32."""

    def __init__(
        self,
        tokens: int,
        hidden: int,
        vocab: int,
        dtype: torch.dtype = torch.float32,
        ignored: float = 0.3,
        seed: int = 0,
        device: torch.device = CPU,
        form: LossForm = PLAIN,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.xn = torch.randn(tokens, hidden, generator=generator).to(device, dtype)
        w = torch.randn(vocab, hidden, generator=generator) * hidden**-0.5
        self.w = w.to(device, dtype)
        targets = torch.randint(vocab, (tokens,), generator=generator)
        targets[torch.rand(tokens, generator=generator) < ignored] = -100
        self.targets = targets.to(device)
        self.scale = 1 / 7
        xn, w = (t.float().detach().requires_grad_() for t in (self.xn, self.w))
        self.form = form
        logits = xn @ w.T
        losses = ideal_losses(logits, self.targets, form).sum()
        loss = losses * self.scale
        self.loss = loss.item()
        self.dxn, self.dw = torch.autograd.grad(loss, (xn, w))

    def in_chunks(
        self, bounds: Sequence[int], tile: int, dxn: Tensor, dw: Tensor, accumulate_dw: bool = False
    ) -> Tensor:
        """Both sweeps over the vocabulary chunks between ``bounds``; returns the loss."""
        loss = torch.tensor(LOSS_START, device=self.xn.device)
        stats = HeadStats.start(len(self.xn), self.xn.device)
        for start, end in pairwise(bounds):
            head_stats(
                self.xn,
                self.w[start:end],
                self.targets,
                start,
                stats,
                tile=tile,
                form=self.form,
            )
        lse = head_loss(stats, self.targets, self.scale, loss, self.form)
        for start, end in pairwise(bounds):
            head_grad(
                self.xn,
                self.w[start:end],
                self.targets,
                start,
                lse,
                self.scale,
                dxn,
                dw[start:end],
                accumulate_dxn=start > 0,
                accumulate_dw=accumulate_dw,
                tile=tile,
                form=self.form,
            )
        return loss

    def in_one(self, tile: int, dxn: Tensor, dw: Tensor, accumulate_dw: bool = False) -> Tensor:
        """One sweep over the whole vocabulary; returns the loss."""
        loss = torch.tensor(LOSS_START, device=self.xn.device)
        head_loss_and_grad(
            self.xn,
            self.w,
            self.targets,
            self.scale,
            loss,
            dxn,
            dw,
            accumulate_dw=accumulate_dw,
            tile=tile,
            form=self.form,
        )
        return loss

    def buffers(self, dxn: torch.dtype, dw: torch.dtype) -> tuple[Tensor, Tensor]:
        """Gradient buffers full of NaN, which must not survive."""
        return (
            torch.full_like(self.xn, torch.nan, dtype=dxn),
            torch.full_like(self.w, torch.nan, dtype=dw),
        )

    def check(self, loss: Tensor, dxn: Tensor, dw: Tensor, limit: float) -> None:
        assert loss.item() - LOSS_START == pytest.approx(self.loss, rel=limit, abs=1e-6)
        for found, expected in ((dxn, self.dxn), (dw, self.dw)):
            error = (found.float() - expected).norm()
            assert float(error) <= limit * float(expected.norm()) + 1e-7


@settings(max_examples=40)
@given(data=st.data())
def test_any_split_matches_full_cross_entropy(data: st.DataObject) -> None:
    tokens, vocab = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 40))
    cuts = data.draw(st.sets(st.integers(1, vocab), max_size=3))
    bounds = sorted({0, vocab} | cuts)
    tile = data.draw(st.integers(1, 25))
    ignored = data.draw(st.sampled_from([0.0, 0.3, 1.0]))
    problem = Problem(
        tokens,
        8,
        vocab,
        ignored=ignored,
        seed=data.draw(st.integers(0, 99)),
        form=LossForm(
            data.draw(st.sampled_from([None, 0.7])),
            data.draw(st.sampled_from([None, 0.2])),
            data.draw(st.sampled_from([None, 0.1])),
            vocab,
        ),
    )
    dxn, dw = problem.buffers(torch.float32, torch.float32)
    problem.check(problem.in_chunks(bounds, tile, dxn, dw), dxn, dw, 1e-5)
    dxn, dw = problem.buffers(torch.float32, torch.float32)
    problem.check(problem.in_one(tile, dxn, dw), dxn, dw, 1e-5)


@pytest.mark.parametrize(
    ("bounds", "tile", "dxn_dtype", "dw_dtype"),
    [
        ([0, 300], 100, torch.bfloat16, torch.bfloat16),
        ([0, 300], 32, torch.bfloat16, torch.float32),
        ([0, 110, 220, 300], 100, torch.float32, torch.bfloat16),
        ([0, 110, 220, 300], 32, torch.float32, torch.float32),
    ],
)
def test_bf16_is_near_fp32(
    bounds: list[int], tile: int, dxn_dtype: torch.dtype, dw_dtype: torch.dtype
) -> None:
    problem = Problem(100, 64, 300, torch.bfloat16)
    dxn, dw = problem.buffers(dxn_dtype, dw_dtype)
    problem.check(problem.in_chunks(bounds, tile, dxn, dw), dxn, dw, 1e-2)
    if len(bounds) == 2:
        dxn, dw = problem.buffers(dxn_dtype, dw_dtype)
        problem.check(problem.in_one(tile, dxn, dw), dxn, dw, 1e-2)


@pytest.mark.parametrize("bounds", [[0, 50], [0, 20, 50]])
def test_micro_batches_add_up(bounds: list[int]) -> None:
    parts = [Problem(9, 8, 50, seed=seed) for seed in range(3)]
    for part in parts[1:]:
        part.w = parts[0].w
    whole = Problem(27, 8, 50)
    whole.w = parts[0].w
    whole.xn = torch.cat([part.xn for part in parts])
    whole.targets = torch.cat([part.targets for part in parts])
    _, dw = whole.buffers(torch.float32, torch.float32)
    for i, part in enumerate(parts):
        dxn, _ = part.buffers(torch.float32, torch.float32)
        if len(bounds) == 2:
            part.in_one(4, dxn, dw, accumulate_dw=i > 0)
        else:
            part.in_chunks(bounds, 4, dxn, dw, accumulate_dw=i > 0)
    dxn, expected = whole.buffers(torch.float32, torch.float32)
    whole.in_one(27, dxn, expected)
    torch.testing.assert_close(dw, expected, rtol=1e-5, atol=1e-6)


def test_one_chunk_needs_no_second_sweep() -> None:
    problem = Problem(20, 8, 50)
    flops = {}
    for name, run in (
        ("one", lambda *grads: problem.in_one(6, *grads)),
        ("chunks", lambda *grads: problem.in_chunks([0, 20, 50], 6, *grads)),
    ):
        with FlopCounterMode(display=False) as counter:
            run(*problem.buffers(torch.float32, torch.float32))
        flops[name] = counter.get_total_flops()
    product = 2 * 20 * 8 * 50
    assert flops == {"one": 3 * product, "chunks": 4 * product}


def test_loss_alone_is_the_loss_of_training() -> None:
    problem = Problem(20, 8, 50)
    loss = torch.tensor(LOSS_START)
    stats = HeadStats.start(20, CPU)
    head_stats(problem.xn, problem.w, problem.targets, 0, stats, tile=6)
    head_loss(stats, problem.targets, problem.scale, loss)
    trained = problem.in_one(6, *problem.buffers(torch.float32, torch.float32))
    assert torch.equal(loss, trained)
    assert loss.item() - LOSS_START == pytest.approx(problem.loss, rel=1e-5)


def test_several_tiles_do_not_fit_a_bf16_gradient() -> None:
    problem = Problem(20, 8, 50, torch.bfloat16)
    with pytest.raises(AssertionError, match="FP32"):
        problem.in_one(6, *problem.buffers(torch.bfloat16, torch.bfloat16))


# -- on a GPU ----------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("bounds", [[0, 1000], [0, 400, 1000]])
def test_gpu_bf16_is_near_fp32(bounds: list[int]) -> None:
    problem = Problem(300, 128, 1000, torch.bfloat16, device=torch.device("cuda"))
    dxn, dw = problem.buffers(torch.float32, torch.float32)
    problem.check(problem.in_chunks(bounds, 128, dxn, dw), dxn, dw, 1e-2)
    dxn, dw = problem.buffers(torch.bfloat16, torch.float32)
    problem.check(problem.in_one(128, dxn, dw), dxn, dw, 1e-2)


@pytest.mark.gpu
def test_gpu_peak_is_within_the_formula_and_the_host_never_waits() -> None:
    tokens, hidden, vocab, tile = 4096, 1024, 128256, 1024
    bf16: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda"}
    xn, w = torch.randn(tokens, hidden, **bf16), torch.randn(vocab, hidden, **bf16) * 0.03
    targets = torch.randint(vocab, (tokens,), device="cuda")
    loss, dxn = torch.zeros((), device="cuda"), torch.empty_like(xn)
    dw = torch.empty(vocab, hidden, device="cuda")
    for _ in range(2):  # the first call loads kernels and makes the workspace of cuBLAS
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.set_sync_debug_mode("error")
        try:
            head_loss_and_grad(
                xn, w, targets, 1 / tokens, loss, dxn, dw, accumulate_dw=False, tile=tile
            )
        finally:
            torch.cuda.set_sync_debug_mode("default")
    peak = torch.cuda.max_memory_allocated() - before
    limit = head_workspace_bytes(vocab, tile, tokens, 2)
    assert 0.9 * limit <= peak <= limit
