"""Gated activations against float64 autograd of torch's own activation functions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from slideformer.kernels.activations import ACTIVATIONS, Activation
from slideformer.kernels.swiglu import swiglu, swiglu_backward

Close = Callable[..., None]

SHAPES = [(5, 123), (3, 1024), (2, 1500), (0, 8)]  # tokens, intermediate size
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda gate: F.gelu(gate, approximate="tanh"),
}


def sample(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(shape[0])
    return 3 * torch.randn(shape, generator=generator).to(device, dtype)


def ideal(gate_up: Tensor, activation: str) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return FUNCTIONS[activation](gate) * up


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_backward(
    shape: tuple[int, int],
    activation: Activation,
    dtype: torch.dtype,
    device: torch.device,
    close: Close,
) -> None:
    tokens, width = shape
    gate_up = sample((tokens, 2 * width), dtype, device)
    dact = sample(shape, dtype, device)
    wide = gate_up.double().requires_grad_()
    expected = ideal(wide, activation)
    (expected_grad,) = torch.autograd.grad(expected, wide, dact.double())

    act = swiglu(gate_up, activation)

    assert act.dtype == dtype
    close(act, expected.detach())

    again = swiglu_backward(dact, gate_up, activation)

    torch.testing.assert_close(again, act)
    close(gate_up, expected_grad)


def test_backward_overwrites_the_gradient(dtype: torch.dtype, device: torch.device) -> None:
    gate_up, dact = sample((4, 90), dtype, device), sample((4, 45), dtype, device)
    other = gate_up.clone()
    expected = swiglu_backward(dact, other)

    act = swiglu_backward(dact, gate_up, out=dact)

    assert act is dact
    assert torch.equal(act, expected)
    assert torch.equal(gate_up, other)


def test_backward_stays_inside_its_tensors(device: torch.device) -> None:
    # The rows end inside a program's piece; what follows the last row must survive.
    tokens, width = 3, 37
    guarded = [torch.full((size + 8,), 7.0, device=device) for size in (222, 111)]
    gate_up, act = guarded[0][:222].view(tokens, 2 * width), guarded[1][:111].view(tokens, width)
    swiglu_backward(sample((tokens, width), torch.float32, device), gate_up, out=act)
    for buffer in guarded:
        assert torch.equal(buffer[-8:].cpu(), torch.full((8,), 7.0))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_large_gates_stay_finite(activation: Activation, device: torch.device) -> None:
    gate_up = torch.tensor([[-1e4, -200.0, 0.0, 200.0, 1e4, 2.0, 2.0, 2.0, 2.0, 2.0]])
    gate_up = gate_up.to(device)
    act = swiglu_backward(torch.ones(1, 5, device=device), gate_up, activation)
    assert act.tolist() == [[0.0, 0.0, 0.0, 400.0, 2e4]]
    assert gate_up.tolist() == [[0.0, 0.0, 1.0, 2.0, 2.0, 0.0, 0.0, 0.0, 200.0, 1e4]]


@pytest.mark.gpu
def test_more_elements_than_32_bits_count() -> None:
    tokens, width = 40_000, 28_672
    gate_up = torch.randn(2 * width, device="cuda", dtype=torch.bfloat16).repeat(tokens, 1)
    assert gate_up.numel() > 2**31
    gate_up[-1] *= 0.5
    tail = gate_up[-2:].clone()
    act = swiglu(gate_up)
    assert torch.equal(act[-2:], swiglu(tail))
    dact = act.clone()
    expected = swiglu_backward(dact[-2:].clone(), tail)
    assert torch.equal(swiglu_backward(dact, gate_up)[-2:], expected)
    assert torch.equal(gate_up[-2:], tail)


def test_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown activation 'relu': use one of silu, gelu"):
        swiglu(torch.ones(2, 4), "relu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"gate_up of shape \(2, 5\)"):
        swiglu(torch.ones(2, 5))
    with pytest.raises(ValueError, match="contiguous"):
        swiglu(torch.ones(4, 2).t())
    with pytest.raises(ValueError, match=r"shape \(2, 3\).* must be \(2, 2\)"):
        swiglu_backward(torch.ones(2, 3), torch.ones(2, 4))
