"""Gated activation of the feed-forward block (Shazeer 2020, https://arxiv.org/abs/2002.05202).

``act = f(gate) * up`` with ``f`` one of ``silu`` (SwiGLU), ``gelu`` and ``gelu_pytorch_tanh``
(GeGLU), in FP32 with one rounding. Backward: ``dgate = dact * up * f'(gate)``, ``dup = dact *
f(gate)``. The two matrix products around it are not done here.
"""

from __future__ import annotations

from torch import Tensor

from slideformer.kernels import reference
from slideformer.kernels.activations import ACTIVATIONS, Activation
from slideformer.kernels.triton_support import triton_enabled


def swiglu(gate_up: Tensor, activation: Activation = "silu") -> Tensor:
    """Compute ``f(gate) * up``; the gate is the first half of ``gate_up``.

    ``gate_up`` is ``[T, 2 I]``, contiguous, bf16 or fp32. Returns ``[T, I]`` in the same dtype.
    Raises ``ValueError`` for a wrong shape or activation.
    """
    _check(gate_up, activation)
    if triton_enabled(gate_up):
        from slideformer.kernels import swiglu_triton

        return swiglu_triton.swiglu(gate_up, activation)
    return reference.swiglu(gate_up, activation)


def swiglu_backward(
    dact: Tensor, gate_up: Tensor, activation: Activation = "silu", out: Tensor | None = None
) -> Tensor:
    """Overwrite ``gate_up`` ``[T, 2 I]`` by its gradient ``(dgate | dup)`` for ``dact`` ``[T, I]``.

    Returns the recomputed activation ``[T, I]``, which the weight gradient of the down projection
    needs. It is written to ``out`` if given, which may be ``dact`` itself. All tensors are
    contiguous. Raises ``ValueError`` for a wrong shape or activation.
    """
    _check(gate_up, activation, dact, out)
    if triton_enabled(gate_up):
        from slideformer.kernels import swiglu_triton

        return swiglu_triton.swiglu_backward(dact, gate_up, activation, out)
    return reference.swiglu_backward(dact, gate_up, activation, out)


def _check(gate_up: Tensor, activation: str, *halves: Tensor | None) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}: use one of {', '.join(ACTIVATIONS)}")
    if gate_up.ndim != 2 or gate_up.shape[1] % 2 or not gate_up.is_contiguous():
        raise ValueError(
            f"swiglu got gate_up of shape {tuple(gate_up.shape)}, strides {gate_up.stride()}: it "
            "must be [tokens, 2 * intermediate size] and contiguous"
        )
    expected = (gate_up.shape[0], gate_up.shape[1] // 2)
    for half in halves:
        if half is not None and (tuple(half.shape) != expected or not half.is_contiguous()):
            raise ValueError(
                f"swiglu got an activation tensor of shape {tuple(half.shape)}, strides "
                f"{half.stride()}: for gate_up {tuple(gate_up.shape)} it must be {expected} and "
                "contiguous"
            )
