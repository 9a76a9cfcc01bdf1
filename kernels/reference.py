"""Plain PyTorch versions of the GPU kernels: what the Triton kernels are tested against.

They run wherever PyTorch runs and serve CPU tensors in production. Arithmetic is FP32, results are
rounded once to the dtype of the input (RMSNorm may round twice, as Hugging Face does). They
allocate FP32 temporaries freely and make no claim to speed. Arguments are checked by the public
functions in ``rms_norm.py``, ``rope.py``, ``swiglu.py``, ``cross_entropy.py``, ``routed.py`` and
``grouped.py``, whose docstrings hold the formulas.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from slideformer.kernels.cross_entropy import LossForm

IGNORE_INDEX = -100
"""Target value of a token without loss, as in ``torch.nn.functional.cross_entropy``."""


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, out: Tensor | None, centred: bool
) -> tuple[Tensor, Tensor]:
    """See :func:`slideformer.kernels.rms_norm.rms_norm`."""
    wide = x.float()
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if centred:
        y = (wide * rstd * (1 + weight.float())).to(x.dtype)
    else:
        y = ((wide * rstd).to(x.dtype).float() * weight.float()).to(x.dtype)
    return y if out is None else out.copy_(y), rstd.flatten()


def rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    residual_grad: Tensor | None,
    out: Tensor | None,
    centred: bool,
) -> tuple[Tensor, Tensor]:
    """See :func:`slideformer.kernels.rms_norm.rms_norm_backward`."""
    scale = rstd.view(*x.shape[:-1], 1)
    normalised = x.float() * scale
    wide_dy = dy.float()
    dweight = (wide_dy * normalised).reshape(-1, x.shape[-1]).sum(0)
    weighted = wide_dy * (weight.float() + 1 if centred else weight.float())
    dx = scale * (weighted - normalised * (weighted * normalised).mean(-1, keepdim=True))
    if residual_grad is not None:
        dx += residual_grad.float()
    dx = dx.to(x.dtype)
    return dx if out is None else out.copy_(dx), dweight


def rope_(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    """See :func:`slideformer.kernels.rope.rope_`."""
    half = x.shape[-1] // 2
    cos = cos[..., :half].unsqueeze(-2)
    sin = sin[..., :half].unsqueeze(-2)
    if inverse:
        sin = -sin
    first, second = x.float().split(half, -1)
    x.copy_(torch.cat((first * cos - second * sin, second * cos + first * sin), -1))
    return x


def _activate(gate: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Value and derivative of the activation at FP32 ``gate``."""
    if activation == "silu":
        sigmoid = torch.sigmoid(gate)
        return gate * sigmoid, sigmoid * (1 + gate * (1 - sigmoid))
    if activation == "gelu_pytorch_tanh":
        slope = math.sqrt(2 / math.pi)
        tanh = torch.tanh(slope * (gate + 0.044715 * gate**3))
        inner = slope * (1 + 3 * 0.044715 * gate.square())
        return 0.5 * gate * (1 + tanh), 0.5 * (1 + tanh) + 0.5 * gate * (1 - tanh**2) * inner
    cdf = 0.5 * (1 + torch.erf(gate * math.sqrt(0.5)))
    density = torch.exp(-0.5 * gate.square()) / math.sqrt(2 * math.pi)
    return gate * cdf, cdf + gate * density


def swiglu(gate_up: Tensor, activation: str) -> Tensor:
    """See :func:`slideformer.kernels.swiglu.swiglu`."""
    gate, up = gate_up.float().chunk(2, -1)
    return (_activate(gate, activation)[0] * up).to(gate_up.dtype)


def swiglu_backward(dact: Tensor, gate_up: Tensor, activation: str, out: Tensor | None) -> Tensor:
    """See :func:`slideformer.kernels.swiglu.swiglu_backward`."""
    gate, up = gate_up.float().chunk(2, -1)
    value, slope = _activate(gate, activation)
    wide_dact = dact.float()
    act = (value * up).to(gate_up.dtype)
    gate_up.copy_(torch.cat((wide_dact * up * slope, wide_dact * value), -1))
    return act if out is None else out.copy_(act)


def lse_accumulate(
    logits: Tensor,
    targets: Tensor,
    vocab_start: int,
    running_max: Tensor,
    running_sum: Tensor,
    target_logit: Tensor,
    form: LossForm,
) -> None:
    """See :func:`slideformer.kernels.cross_entropy.lse_accumulate`."""
    wide = logits.float()
    if form.softcap is not None:
        wide = form.softcap * torch.tanh(wide / form.softcap)
    # Finite even if all logits so far are -inf, so that no difference of infinities arises.
    new_max = torch.maximum(running_max, wide.amax(-1)).clamp_min(torch.finfo(torch.float32).min)
    chunk_sum = torch.exp(wide - new_max[:, None]).sum(-1)
    running_sum.copy_(running_sum * torch.exp(running_max - new_max) + chunk_sum)
    running_max.copy_(new_max)
    column = targets - vocab_start
    inside = (column >= 0) & (column < logits.shape[-1])
    picked = wide.gather(-1, column.clamp(0, logits.shape[-1] - 1)[:, None])[:, 0]
    if form.smoothing is not None:
        target_logit.add_(wide.sum(-1), alpha=form.spread)
        picked = (1 - form.smoothing) * picked
    target_logit.copy_(torch.where(inside, target_logit + picked, target_logit))


def softmax_grad_(
    logits: Tensor,
    targets: Tensor,
    vocab_start: int,
    lse: Tensor,
    scale: float,
    form: LossForm,
) -> Tensor:
    """See :func:`slideformer.kernels.cross_entropy.softmax_grad_`."""
    wide = logits.float()
    slope: Tensor | None = None
    if form.softcap is not None:
        tanh = torch.tanh(wide / form.softcap)
        wide, slope = form.softcap * tanh, 1 - tanh.square()
    columns = torch.arange(logits.shape[-1], device=logits.device) + vocab_start
    grad = torch.exp(wide - lse[:, None])
    if form.z_loss is not None:
        grad *= 1 + 2 * form.z_loss * lse[:, None]
    certain = 1.0 if form.smoothing is None else 1 - form.smoothing
    grad -= certain * (columns == targets[:, None]).float() + form.spread
    if slope is not None:
        grad *= slope
    valid = (targets != IGNORE_INDEX)[:, None]
    return logits.copy_(torch.where(valid, grad * scale, 0.0))


def gather_sum(
    rows: Tensor, places: Tensor, weights: Tensor | None, residual: Tensor, out: Tensor
) -> None:
    """See :func:`slideformer.kernels.routed.gather_sum`."""
    total = residual.float()
    for j in range(places.shape[1]):
        value = rows[places[:, j]].float()
        total = total + (value if weights is None else weights[:, j, None] * value)
    out.copy_(total)


def row_products(left: Tensor, right: Tensor) -> Tensor:
    """See :func:`slideformer.kernels.routed.row_products`."""
    return (left.float() * right.float()).sum(-1)


def grouped_product(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """See :func:`slideformer.kernels.grouped.grouped_product`."""
    out = rows.new_empty(len(rows), matrices.shape[2])
    for group, part in _groups(ends):
        torch.mm(rows[part], matrices[group], out=out[part])
    return out


def grouped_gradient_(
    out: Tensor, left: Tensor, right: Tensor, ends: Tensor, accumulate: bool
) -> None:
    """See :func:`slideformer.kernels.grouped.grouped_gradient_`."""
    for group, part in _groups(ends):
        product = left[part].float().T @ right[part].float()
        out[group].add_(product) if accumulate else out[group].copy_(product)


def _groups(ends: Tensor) -> Iterator[tuple[int, slice]]:
    """Each group and its rows."""
    start = 0
    for group, end in enumerate(ends.tolist()):
        yield group, slice(start, end)
        start = end
