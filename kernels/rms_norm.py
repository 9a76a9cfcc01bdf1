"""RMSNorm: forward, and the hand-driven backward.

Forward (Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467), in the rounding order of Hugging
Face's ``LlamaRMSNorm``: with ``rstd = 1 / sqrt(mean(x^2) + eps)`` in FP32,
``y = cast(x * rstd) * weight``, where ``cast`` rounds to the dtype of ``x``. A ``centred`` weight
is stored less one, and rounding waits for the product, as in ``Gemma2RMSNorm``:
``y = cast(x * rstd * (1 + weight))``.

Backward, with ``n = x * rstd`` and ``g = dy * weight``, or ``dy * (1 + weight)``, in FP32, the
roundings passed straight through: ``dx = rstd * (g - n * mean(g * n))`` and ``dweight = sum over
rows of dy * n``.

CUDA tensors run one Triton kernel per call, others the plain reference. Nothing here is an autograd
function, and nothing waits for the device.
"""

from __future__ import annotations

from torch import Tensor

from slideformer.kernels import reference
from slideformer.kernels.triton_support import triton_enabled


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    out: Tensor | None = None,
    *,
    centred: bool = False,
) -> tuple[Tensor, Tensor]:
    """Normalise the last dimension of ``x``.

    ``x`` is ``[..., n]``, bf16 or fp32, contiguous in the last dimension. The leading dimensions
    may be strided as far as they fold into two (a per-head view ``[T, H, D]`` of a fused projection
    does). ``weight`` is ``[n]``. ``out`` receives the result and may be ``x`` itself.

    Returns ``(y, rstd)``: ``y`` like ``x``, ``rstd`` float32 ``[rows]`` in row-major order of the
    leading dimensions. Raises ``ValueError`` if the shapes do not fit.
    """
    _check(x, weight, out)
    if triton_enabled(x):
        from slideformer.kernels import rms_norm_triton

        return rms_norm_triton.rms_norm(x, weight, eps, out, centred)
    return reference.rms_norm(x, weight, eps, out, centred)


def rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    residual_grad: Tensor | None = None,
    out: Tensor | None = None,
    *,
    centred: bool = False,
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`rms_norm` at ``x``, given ``dy`` and the ``rstd`` of the forward.

    ``dy``, ``x``, ``residual_grad`` and ``out`` are ``[..., n]`` with strides as :func:`rms_norm`
    allows, each its own. ``residual_grad``, the gradient that bypasses the norm, is added in FP32
    before the one rounding. ``out`` receives ``dx`` and may be ``dy``, ``x`` or ``residual_grad``
    itself.

    Returns ``(dx, dweight)``: ``dx`` like ``x``, ``dweight`` float32 ``[n]``, summed in an order
    that depends on the shape and the device only. Raises ``ValueError`` if the shapes do not fit.
    """
    _check(x, weight, dy, residual_grad, out)
    if triton_enabled(x):
        from slideformer.kernels import rms_norm_triton

        return rms_norm_triton.rms_norm_backward(dy, x, weight, rstd, residual_grad, out, centred)
    return reference.rms_norm_backward(dy, x, weight, rstd, residual_grad, out, centred)


def _check(x: Tensor, weight: Tensor, *others: Tensor | None) -> None:
    if weight.ndim != 1 or x.shape[-1] != weight.shape[0]:
        raise ValueError(
            f"RMSNorm weight has shape {tuple(weight.shape)}, x has shape {tuple(x.shape)}: "
            "the weight must be one-dimensional, as long as the last dimension of x"
        )
    for tensor in (x, *others):
        if tensor is not None and (tensor.shape != x.shape or tensor.stride(-1) != 1):
            raise ValueError(
                f"RMSNorm got a tensor of shape {tuple(tensor.shape)}, strides {tensor.stride()}: "
                f"it must be {tuple(x.shape)}, contiguous in the last dimension"
            )
