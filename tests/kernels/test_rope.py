"""Rotary embedding against float64 autograd of the rotate-half formula."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from slideformer.kernels.rope import rope_

Close = Callable[..., None]

# [batch, sequence, heads, head size]; the last has more heads than one program takes.
SHAPES = [(1, 5, 3, 8), (2, 7, 5, 10), (1, 1, 1, 2), (2, 3, 19, 128)]


def sample(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(device, dtype)


def tables(
    batch: int | None, sequence: int, size: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and sines scaled by 1.25 (attention scaling), other positions for each batch."""
    positions = torch.arange(sequence)[None] + 11 * torch.arange(batch or 1)[:, None]
    angles = positions[..., None] * 10.0 ** -torch.arange(size // 2)
    angles = torch.cat((angles, angles), -1)
    if batch is None:
        angles = angles[0]
    return (1.25 * angles.cos()).to(device), (1.25 * angles.sin()).to(device)


def ideal(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    rotated = torch.cat((-b, a), -1)
    return x * cos.double().unsqueeze(-2) + rotated * sin.double().unsqueeze(-2)


@pytest.mark.parametrize("per_batch", ["shared", "one", "each"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_adjoint(
    shape: tuple[int, int, int, int],
    per_batch: str,
    dtype: torch.dtype,
    device: torch.device,
    close: Close,
) -> None:
    batch = {"shared": None, "one": 1, "each": shape[0]}[per_batch]
    cos, sin = tables(batch, shape[1], shape[3], device)
    x = sample(shape, dtype, device)
    wide = x.double().requires_grad_()
    expected = ideal(wide, cos, sin)

    result = rope_(x, cos, sin)

    assert result is x
    close(x, expected.detach())

    grad = sample(shape, dtype, device).flip(1)
    (expected_grad,) = torch.autograd.grad(expected, wide, grad.double())
    close(rope_(grad, cos, sin, inverse=True), expected_grad)


def test_heads_of_a_fused_projection(
    dtype: torch.dtype, device: torch.device, close: Close
) -> None:
    batch, sequence, heads, size = 2, 5, 4, 6
    fused = sample((batch, sequence, 6 * size), dtype, device)
    before = fused.clone()
    cos, sin = tables(None, sequence, size, device)
    x, old = (t[..., : heads * size].unflatten(-1, (heads, size)) for t in (fused, before))

    rope_(x, cos, sin)

    close(x, ideal(old.double(), cos, sin))
    assert torch.equal(fused[..., heads * size :], before[..., heads * size :])


def test_heads_before_the_sequence(dtype: torch.dtype, device: torch.device, close: Close) -> None:
    stored = sample((2, 3, 5, 8), dtype, device)  # [batch, heads, sequence, head size]
    expected = stored.double().transpose(1, 2)
    cos, sin = tables(2, 5, 8, device)
    rope_(stored.transpose(1, 2), cos, sin)
    close(stored.transpose(1, 2), ideal(expected, cos, sin))


@given(st.integers(1, 6), st.integers(0, 2**31))
def test_the_inverse_undoes_a_rotation(half: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((2, 3, 2, 2 * half), generator=generator)
    angles = 100 * torch.rand((3, half), generator=generator).repeat(1, 2)
    before = x.clone()
    rope_(x, angles.cos(), angles.sin())
    torch.testing.assert_close(x.norm(dim=-1), before.norm(dim=-1))
    rope_(x, angles.cos(), angles.sin(), inverse=True)
    torch.testing.assert_close(x, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("x", "cos", "message"),
    [
        (torch.ones(1, 2, 3, 5), torch.ones(2, 5), "even"),
        (torch.ones(2, 3, 4), torch.ones(3, 4), r"shape \(2, 3, 4\)"),
        (torch.ones(1, 2, 3, 4), torch.ones(3, 4), r"cos \(3, 4\)"),
        (torch.ones(1, 2, 3, 4), torch.ones(2, 4).bfloat16(), "float32"),
        (torch.ones(1, 2, 4, 4).transpose(2, 3), torch.ones(2, 4), "contiguous last"),
        (torch.ones(1, 2, 3, 4), torch.ones(4, 2).t(), "tables"),
    ],
)
def test_refused(x: Tensor, cos: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rope_(x, cos, cos)
