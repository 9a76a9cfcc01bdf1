"""RMSNorm against float64 autograd, on awkward shapes, strided views and in place."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from slideformer.kernels.rms_norm import rms_norm, rms_norm_backward

EPS = 1e-5
Close = Callable[..., None]

# Short rows in groups, more rows than the backward has programs for, rows of one program, one row.
SHAPES = [(5, 123), (9, 7, 41), (300, 41), (3, 2500), (48,)]


def tensors(count: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> list:
    generator = torch.Generator().manual_seed(hash(shape) % 1000)
    return [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(count)]


def gain(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.linspace(0.5, -1.5, n).to(device, dtype)


def ideal_norm(x: Tensor, weight: Tensor, centred: bool = False) -> Tensor:
    normalised = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
    return normalised * (1 + weight if centred else weight)


def ideal_gradients(
    dy: Tensor, x: Tensor, weight: Tensor, centred: bool = False
) -> tuple[Tensor, Tensor]:
    x = x.double().requires_grad_()
    weight = weight.double().requires_grad_()
    return torch.autograd.grad(ideal_norm(x, weight, centred), (x, weight), dy.double())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, close: Close
) -> None:
    (x,) = tensors(1, shape, dtype, device)
    weight = gain(shape[-1], dtype, device)

    y, rstd = rms_norm(x, weight, EPS)

    assert y.dtype == dtype
    assert y.shape == x.shape
    close(y, ideal_norm(x.double(), weight.double()), roundings=2)
    assert rstd.dtype == torch.float32
    close(rstd, torch.rsqrt(x.double().square().mean(-1) + EPS).flatten())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weights_stored_less_one(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, close: Close
) -> None:
    x, dy, residual_grad = tensors(3, shape, dtype, device)
    weight = gain(shape[-1], dtype, device)

    y, rstd = rms_norm(x, weight, EPS, centred=True)
    dx, dweight = rms_norm_backward(dy, x, weight, rstd, residual_grad, centred=True)

    close(y, ideal_norm(x.double(), weight.double(), centred=True))  # one rounding, not two
    ideal_dx, ideal_dweight = ideal_gradients(dy, x, weight, centred=True)
    close(dx, ideal_dx + residual_grad.double())
    close(dweight, ideal_dweight)


@pytest.mark.parametrize("bypass", [False, True], ids=["alone", "bypass"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backward(
    shape: tuple[int, ...], bypass: bool, dtype: torch.dtype, device: torch.device, close: Close
) -> None:
    x, dy, residual_grad = tensors(3, shape, dtype, device)
    weight = gain(shape[-1], dtype, device)
    _, rstd = rms_norm(x, weight, EPS)

    dx, dweight = rms_norm_backward(dy, x, weight, rstd, residual_grad if bypass else None)

    ideal_dx, ideal_dweight = ideal_gradients(dy, x, weight)
    assert dx.dtype == dtype
    close(dx, ideal_dx + residual_grad.double() if bypass else ideal_dx)
    assert dweight.dtype == torch.float32
    close(dweight, ideal_dweight)


@pytest.mark.parametrize("target", ["dy", "x", "residual_grad"])
def test_backward_overwrites_an_input(
    target: str, dtype: torch.dtype, device: torch.device
) -> None:
    # More rows than programs: a program's later rows must survive its earlier stores.
    x, dy, residual_grad = tensors(3, (300, 41), dtype, device)
    weight = gain(41, dtype, device)
    _, rstd = rms_norm(x, weight, EPS)
    expected = rms_norm_backward(dy, x, weight, rstd, residual_grad)
    out = {"dy": dy, "x": x, "residual_grad": residual_grad}[target]

    dx, dweight = rms_norm_backward(dy, x, weight, rstd, residual_grad, out=out)

    assert dx is out
    assert torch.equal(dx, expected[0])
    assert torch.equal(dweight, expected[1])


def test_heads_of_a_fused_projection(
    dtype: torch.dtype, device: torch.device, close: Close
) -> None:
    tokens, heads, size = 6, 3, 10
    fused, dfused = tensors(2, (tokens, 5 * size), dtype, device)
    weight = gain(size, dtype, device)
    before, dbefore = fused.clone(), dfused.clone()
    x, ideal_x = (t[:, : heads * size].view(tokens, heads, size) for t in (fused, before))
    dy, ideal_dy = (t[:, : heads * size].view(tokens, heads, size) for t in (dfused, dbefore))

    y, rstd = rms_norm(x, weight, EPS, out=x)

    assert y is x
    close(y, ideal_norm(ideal_x.double(), weight.double()), roundings=2)
    assert torch.equal(fused[:, heads * size :], before[:, heads * size :])

    (residual_grad,) = tensors(1, (tokens, heads, size), dtype, device)  # packed, unlike the views
    dx, dweight = rms_norm_backward(dy, ideal_x, weight, rstd, residual_grad, out=dy)

    ideal_dx, ideal_dweight = ideal_gradients(ideal_dy, ideal_x, weight)
    close(dx, ideal_dx + residual_grad.double())
    close(dweight, ideal_dweight)
    assert torch.equal(dfused[:, heads * size :], dbefore[:, heads * size :])


def test_same_call_same_bits(device: torch.device) -> None:
    x, dy = tensors(2, (700, 64), torch.bfloat16, device)
    weight = gain(64, torch.bfloat16, device)
    _, rstd = rms_norm(x, weight, EPS)
    first = rms_norm_backward(dy, x, weight, rstd)
    second = rms_norm_backward(dy, x, weight, rstd)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_no_rows(device: torch.device) -> None:
    x = torch.empty(0, 16, device=device)
    weight = torch.ones(16, device=device)
    y, rstd = rms_norm(x, weight, EPS)
    assert y.shape == (0, 16)
    _, dweight = rms_norm_backward(x, x, weight, rstd)
    assert torch.equal(dweight.cpu(), torch.zeros(16))


def test_reference_rounds_like_hugging_face() -> None:
    (x,) = tensors(1, (64, 96), torch.bfloat16, torch.device("cpu"))
    weight = gain(96, torch.bfloat16, torch.device("cpu"))
    wide = x.float()
    normalised = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).bfloat16()
    assert torch.equal(rms_norm(x, weight, EPS)[0], weight * normalised)


def test_reference_rounds_centred_weights_like_hugging_face() -> None:
    (x,) = tensors(1, (64, 96), torch.bfloat16, torch.device("cpu"))
    weight = gain(96, torch.bfloat16, torch.device("cpu"))
    wide = x.float()
    normalised = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    expected = (normalised * (1.0 + weight.float())).bfloat16()
    assert torch.equal(rms_norm(x, weight, EPS, centred=True)[0], expected)


@given(st.lists(st.floats(-8, 8), min_size=2, max_size=9), st.sampled_from([-4.0, -0.5, 2.0, 64.0]))
def test_without_eps_only_the_sign_of_a_factor_matters(row: list[float], factor: float) -> None:
    x = torch.tensor([row]) + torch.tensor([[9.0, *[0.0] * (len(row) - 1)]])
    weight = torch.ones(len(row))
    y, rstd = rms_norm(x, weight, 0.0)
    scaled, scaled_rstd = rms_norm(factor * x, weight, 0.0)
    torch.testing.assert_close(scaled, y if factor > 0 else -y)
    torch.testing.assert_close(scaled_rstd * abs(factor), rstd)


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.ones(2, 8), torch.ones(7), r"weight has shape \(7,\), x has shape \(2, 8\)"),
        (torch.ones(2, 8), torch.ones(1, 8), "one-dimensional"),
        (torch.ones(8, 2).t(), torch.ones(8), "contiguous in the last dimension"),
    ],
)
def test_refused(x: Tensor, weight: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rms_norm(x, weight, EPS)


def test_refuses_an_output_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"shape \(3, 8\).* must be \(2, 8\)"):
        rms_norm(torch.ones(2, 8), torch.ones(8), EPS, torch.ones(3, 8))
