"""Soft-capped attention against the formula under autograd in FP64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slideformer.models import softcapped
from slideformer.models.attention import window_mask
from slideformer.models.softcapped import softcapped_attention
from slideformer.models.workspace import softcapped_workspace

CPU = torch.device("cpu")


def formula(q: Tensor, k: Tensor, v: Tensor, scale: float, cap: float, seen: Tensor) -> Tensor:
    groups = q.shape[2] // k.shape[2]
    k, v = (t.repeat_interleave(groups, dim=2) for t in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    scores = (cap * torch.tanh(scores / cap)).masked_fill(~seen, float("-inf"))
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


def check(
    shape: tuple[int, int, int, int, int], window: int | None, dtype: torch.dtype, limit: float
) -> None:
    batch, seq, kv_heads, groups, dim = shape
    generator = torch.Generator().manual_seed(seq)
    heads = (kv_heads * groups, kv_heads, kv_heads)
    inputs = [(2 * torch.randn(batch, seq, n, dim, generator=generator)).to(dtype) for n in heads]
    upstream = torch.randn(batch, seq, heads[0], dim, generator=generator).to(dtype)
    mask = window_mask(seq, window, CPU)
    ours = [t.requires_grad_() for t in inputs]
    out = softcapped_attention(*ours, scale=0.7, softcap=3.0, mask=mask)
    found = [out, *torch.autograd.grad(out, ours, upstream)]
    wide = [t.detach().double().requires_grad_() for t in inputs]
    seen = torch.ones(seq, seq, dtype=torch.bool).tril() if mask is None else mask
    ideal = formula(*wide, 0.7, 3.0, seen)
    expected = [ideal, *torch.autograd.grad(ideal, wide, upstream.double())]
    for one, other in zip(found, expected, strict=True):
        assert one.dtype is dtype
        error = (one.detach().double() - other.detach()).norm()
        size = max(float(other.detach().norm()), float(upstream.double().norm()))
        assert float(error) <= limit * size


@settings(max_examples=25)
@given(
    shape=st.tuples(
        st.integers(1, 2), st.integers(1, 19), st.integers(1, 2), st.integers(1, 3), st.just(4)
    ),
    window=st.none() | st.integers(1, 20),
    block=st.sampled_from([1, 60, 2**23]),
)
def test_any_shape_and_block(
    shape: tuple[int, int, int, int, int], window: int | None, block: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(softcapped, "BLOCK_SCORES", block)
        check(shape, window, torch.float32, 1e-5)


@pytest.mark.parametrize("window", [None, 5])
def test_bf16(window: int | None) -> None:
    check((2, 33, 2, 2, 16), window, torch.bfloat16, 1e-2)


def test_the_cap_matters() -> None:
    """The comparisons above would notice scores that are not capped."""
    q, k, v = (3 * torch.randn(1, 9, 1, 8) for _ in range(3))
    seen = torch.ones(9, 9, dtype=torch.bool).tril()
    capped, open_ = (formula(q, k, v, 0.7, cap, seen) for cap in (3.0, 1e6))
    assert float((capped - open_).norm()) > 0.05 * float(capped.norm())


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 100])
def test_gpu_bf16_is_near_fp32_within_its_workspace(window: int | None) -> None:
    shape = (2, 2048, 8, 256)
    q = torch.randn(shape, device="cuda").bfloat16().requires_grad_()
    k, v = (torch.randn(2, 2048, 4, 256, device="cuda").bfloat16() for _ in range(2))
    k, v = k.requires_grad_(), v.requires_grad_()
    upstream = torch.randn(shape, device="cuda").bfloat16()
    mask = window_mask(2048, window, q.device)
    seen = torch.ones(2048, 2048, dtype=torch.bool, device="cuda").tril() if mask is None else mask
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = softcapped_attention(q, k, v, scale=256**-0.5, softcap=50.0, mask=mask)
    found = [out, *torch.autograd.grad(out, (q, k, v), upstream)]
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    held = 2 * q.nbytes + 2 * (k.nbytes + v.nbytes) * 2
    assert peak <= held + softcapped_workspace(8, 2048) + 12 * 2**20
    wide = [t.detach().float().requires_grad_() for t in (q, k, v)]
    ideal = formula(*wide, 256**-0.5, 50.0, seen)
    expected = [ideal, *torch.autograd.grad(ideal, wide, upstream.float())]
    for one, other in zip(found, expected, strict=True):
        error = (one.detach().float() - other.detach()).norm()
        assert float(error) <= 2e-2 * float(other.detach().norm())
