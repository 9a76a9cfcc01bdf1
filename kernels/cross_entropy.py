"""Cross-entropy over logits that exist one tile at a time.

A head that streams its vocabulary in chunks makes a tile ``[N, Vc]`` of logits (N tokens, the Vc
columns from ``vocab_start``) and sweeps twice over the vocabulary:

1. :func:`lse_accumulate` on each tile keeps the online maximum and sum of exponentials (Milakov &
   Gimelshein 2018, https://arxiv.org/abs/1805.02867) and picks the targets' logits;
   :func:`lse_finish` and :func:`token_losses` give ``loss = lse - logit[target]``.
2. :func:`softmax_grad_` turns each tile, made again, into ``(exp(logit - lse) - onehot) * scale``.

If one tile spans the whole vocabulary, both run on the same tile. The matrix products are not done
here. A :class:`LossForm` may ask for more: with smoothing e over a vocabulary of V and a z-loss z,

    loss = lse - (1 - e) * logit[target] - e / V * sum(logits) + z * lse^2
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from slideformer.kernels import reference
from slideformer.kernels.reference import IGNORE_INDEX
from slideformer.kernels.triton_support import triton_enabled


class LossForm(NamedTuple):
    """What is beside plain cross-entropy; a value of None leaves its part out."""

    softcap: float | None = None
    """Replaces a logit by ``softcap * tanh(logit / softcap)`` (Gemma 2)."""
    smoothing: float | None = None
    """Share of the target's weight that is spread over the vocabulary, target included (label
    smoothing, Szegedy et al. 2016, https://arxiv.org/abs/1512.00567)."""
    z_loss: float | None = None
    """Weight of the squared log-sum-exp (PaLM, https://arxiv.org/abs/2204.02311)."""
    vocabulary: int = 0
    """Size of the whole vocabulary; needed for smoothing."""

    @property
    def spread(self) -> float:
        """The weight that smoothing gives to every logit."""
        return 0.0 if self.smoothing is None else self.smoothing / self.vocabulary


PLAIN = LossForm()
"""Cross-entropy alone."""


def lse_init(
    tokens: int, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Fresh ``(running_max, running_sum, target_logit)``, each float32 ``[tokens]``.

    With smoothing the last becomes the weighted sum of logits that the loss subtracts.
    """
    running_max = torch.full((tokens,), float("-inf"), dtype=torch.float32, device=device)
    return running_max, torch.zeros_like(running_max), torch.zeros_like(running_max)


def lse_accumulate(
    logits: Tensor,
    targets: Tensor,
    vocab_start: int,
    running_max: Tensor,
    running_sum: Tensor,
    target_logit: Tensor,
    form: LossForm = PLAIN,
) -> None:
    """Fold one tile of logits into the three running tensors, in place.

    ``logits`` is ``[N, Vc]``, bf16 or fp32, contiguous in the last dimension, the columns
    ``vocab_start`` to ``vocab_start + Vc`` of the vocabulary. ``targets`` is int64 ``[N]``, -100
    where a token has no loss; other targets must lie inside the vocabulary, which is not checked
    (it would wait for the device). The running tensors come from :func:`lse_init`. Raises
    ``ValueError`` if the shapes do not fit.
    """
    _check(logits, targets, running_max, running_sum, target_logit)
    if triton_enabled(logits):
        from slideformer.kernels import cross_entropy_triton

        implementation = cross_entropy_triton.lse_accumulate
    else:
        implementation = reference.lse_accumulate
    implementation(logits, targets, vocab_start, running_max, running_sum, target_logit, form)


def lse_finish(running_max: Tensor, running_sum: Tensor) -> Tensor:
    """Log of the sum of exponentials over all tiles seen, float32 ``[N]``."""
    return running_max + running_sum.log()


def token_losses(
    lse: Tensor, target_logit: Tensor, targets: Tensor, form: LossForm = PLAIN
) -> Tensor:
    """Loss of each token, float32 ``[N]``; 0 where the target is -100."""
    losses = lse - target_logit
    if form.z_loss is not None:
        losses = losses + form.z_loss * lse.square()
    return torch.where(targets == IGNORE_INDEX, 0.0, losses)


def softmax_grad_(
    logits: Tensor,
    targets: Tensor,
    vocab_start: int,
    lse: Tensor,
    scale: float,
    form: LossForm = PLAIN,
) -> Tensor:
    """Overwrite a tile of logits with the gradient of ``scale * sum(losses)``, and return it.

    ``logits``, ``targets``, ``vocab_start`` and ``form`` are those of :func:`lse_accumulate`,
    ``lse`` is float32 ``[N]``. Rows whose target is -100 become 0, whatever they held. Raises
    ``ValueError`` if the shapes do not fit.
    """
    _check(logits, targets, lse)
    if triton_enabled(logits):
        from slideformer.kernels import cross_entropy_triton

        return cross_entropy_triton.softmax_grad_(logits, targets, vocab_start, lse, scale, form)
    return reference.softmax_grad_(logits, targets, vocab_start, lse, scale, form)


def _check(logits: Tensor, *per_token: Tensor) -> None:
    if logits.ndim != 2 or (logits.shape[1] > 1 and logits.stride(1) != 1):
        raise ValueError(
            f"cross-entropy got logits of shape {tuple(logits.shape)}, strides {logits.stride()}: "
            "a tile must be [tokens, vocabulary columns], contiguous in the last dimension"
        )
    for tensor in per_token:
        if tensor.shape != logits.shape[:1] or not tensor.is_contiguous():
            raise ValueError(
                f"cross-entropy got a per-token tensor of shape {tuple(tensor.shape)} for "
                f"{logits.shape[0]} tokens: it must be contiguous, one element a token"
            )
