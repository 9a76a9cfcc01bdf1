"""Causal attention whose forward can be kept: PyTorch's fused kernels, called one half at a time.

`scaled_dot_product_attention` chooses a kernel, and autograd keeps what its backward needs. Here
the same kernel is called directly, so that its output and log-sum-exp may wait for backward in a
place of the caller's, and backward needs no forward.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend


class Saved(NamedTuple):
    """What the backward of attention needs of its forward beside the inputs."""

    output: Tensor
    """[B, S, H, D] in the dtype of the inputs."""
    lse: Tensor
    """Logarithm of each row's sum of exponentials, FP32 [B, H, S]."""


class FusedAttention(NamedTuple):
    """softmax(scale · q kᵀ + causal mask) v through one of the fused kernels.

    ``q`` [B, S, H, D], ``k`` and ``v`` [B, S, K, D], K a divisor of H, are those it was chosen for.
    """

    backend: SDPBackend
    scale: float

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Saved:
        """Output and log-sum-exp."""
        heads, scale = _swapped(q, k, v), self.scale
        if q.device.type == "cpu":
            found = _ATEN._scaled_dot_product_flash_attention_for_cpu(
                *heads, 0.0, True, scale=scale
            )
        elif self.backend == SDPBackend.CUDNN_ATTENTION:
            found = _ATEN._scaled_dot_product_cudnn_attention(
                *heads, None, True, 0.0, True, scale=scale
            )
        else:
            found = _ATEN._scaled_dot_product_flash_attention(*heads, 0.0, True, scale=scale)
        return Saved(found[0].transpose(1, 2), found[1].view(q.shape[0], q.shape[2], q.shape[1]))

    def backward(
        self, d_output: Tensor, q: Tensor, k: Tensor, v: Tensor, saved: Saved
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the inputs, in their shapes."""
        heads, scale, size = _swapped(d_output, q, k, v, saved.output), self.scale, q.shape[1]
        if q.device.type == "cpu":
            found = _ATEN._scaled_dot_product_flash_attention_for_cpu_backward(
                *heads, saved.lse, 0.0, True, scale=scale
            )
        elif self.backend == SDPBackend.CUDNN_ATTENTION:
            none = q.new_empty((), dtype=torch.int64)  # the state of the dropout that there is not
            lse = saved.lse.unsqueeze(-1)
            found = _ATEN._scaled_dot_product_cudnn_attention_backward(
                *heads, lse, none, none, None, None, None, size, size, 0.0, True, scale=scale
            )
        else:
            none = q.new_empty(2, dtype=torch.uint64)
            found = _ATEN._scaled_dot_product_flash_attention_backward(
                *heads, saved.lse, None, None, size, size, 0.0, True, none, none, scale=scale
            )
        dq, dk, dv = _swapped(*found)
        return dq, dk, dv


def fused_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> FusedAttention | None:
    """The kernel that PyTorch would choose; None if its halves cannot be called on their own."""
    choice = _ATEN._fused_sdp_choice(
        *_swapped(q, k, v), None, 0.0, True, scale=scale, enable_gqa=q.shape[2] > k.shape[2]
    )
    backend = SDPBackend(choice)
    if backend not in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        return None
    if q.device.type != "cpu" and q.shape[-1] % 8:  # PyTorch would pad the heads
        return None
    return FusedAttention(backend, scale)


def _swapped(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Heads and positions exchanged: [B, S, H, D] ↔ [B, H, S, D]."""
    return tuple(t.transpose(1, 2) for t in tensors)


_ATEN: Any = torch.ops.aten
