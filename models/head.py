"""Output matrix and loss, one tile of logits at a time, forward and backward.

A tile is some tokens × the columns of one vocabulary chunk; full logits never exist. Where the
output matrix comes in one piece, :func:`head_loss_and_grad` makes each tile once: three products in
all. Where it comes in chunks, one sweep of :func:`head_stats` over all of them gives every token's
log-sum-exp, and a second, of :func:`head_grad`, makes each tile again and turns it into gradients:
four products. Evaluation is the first sweep and :func:`head_loss` alone.

The final norm is not done here: ``xn`` is its output, and ``dxn``, FP32 or not, goes to
:func:`slideformer.kernels.rms_norm.rms_norm_backward`. Targets are already shifted. Loss and
gradients are scaled by ``scale``, one over the number of target tokens of the whole step, which the
caller counts on the host: nothing here waits for the device. Call under ``torch.no_grad()``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from slideformer.kernels.cross_entropy import (
    PLAIN,
    LossForm,
    lse_accumulate,
    lse_finish,
    lse_init,
    softmax_grad_,
    token_losses,
)
from slideformer.models.gradients import product_


class HeadStats(NamedTuple):
    """What a sweep over the vocabulary keeps of the logits it has seen: FP32 [T] each."""

    running_max: Tensor
    running_sum: Tensor
    target_logit: Tensor

    @classmethod
    def start(cls, tokens: int, device: torch.device) -> HeadStats:
        """The state before the first chunk."""
        return cls(*lse_init(tokens, device))

    def part(self, rows: slice) -> HeadStats:
        """Views of the state of some tokens."""
        return HeadStats(self.running_max[rows], self.running_sum[rows], self.target_logit[rows])


def head_stats(
    xn: Tensor,
    w_chunk: Tensor,
    targets: Tensor,
    vocab_start: int,
    stats: HeadStats,
    *,
    tile: int,
    form: LossForm = PLAIN,
) -> None:
    """Fold the logits of one vocabulary chunk into ``stats``.

    ``xn`` [T, h] and ``w_chunk`` [Vc, h], rows ``vocab_start`` … of the output matrix, are both
    BF16 or both FP32; ``targets`` is int64 [T], −100 where a token has no loss; ``tile`` is the
    number of tokens whose logits exist at once; ``form`` is what the loss has beside cross-entropy.
    Every chunk must be seen exactly once.
    """
    for rows, logits in _tiles(xn, w_chunk, tile):
        lse_accumulate(logits, targets[rows], vocab_start, *stats.part(rows), form)


def head_loss(
    stats: HeadStats, targets: Tensor, scale: float, loss: Tensor, form: LossForm = PLAIN
) -> Tensor:
    """After the last chunk: add ``scale`` · Σ token losses to ``loss``, a scalar FP32 tensor.

    Returns the log-sum-exp of each token's logits, FP32 [T].
    """
    lse = lse_finish(stats.running_max, stats.running_sum)
    loss.add_(token_losses(lse, stats.target_logit, targets, form).sum(), alpha=scale)
    return lse


def head_grad(
    xn: Tensor,
    w_chunk: Tensor,
    targets: Tensor,
    vocab_start: int,
    lse: Tensor,
    scale: float,
    dxn: Tensor,
    dw_chunk: Tensor | None,
    *,
    accumulate_dxn: bool,
    accumulate_dw: bool,
    tile: int,
    form: LossForm = PLAIN,
) -> None:
    """Gradients of the scaled loss through one vocabulary chunk.

    ``lse`` is what :func:`head_loss` returned, the other inputs are those of :func:`head_stats`.
    ``dxn`` [T, h] is overwritten by the first chunk and added to by later ones
    (``accumulate_dxn``); ``dw_chunk`` [Vc, h] is overwritten, or with ``accumulate_dw`` added to;
    without one the matrix is frozen. Each is in the dtype of ``xn``, or in FP32, which it must be
    where more than one product is summed in it: ``dxn`` over several chunks, ``dw_chunk`` over
    several tiles or micro-batches.
    """
    for rows, logits in _tiles(xn, w_chunk, tile):
        d_logits = softmax_grad_(logits, targets[rows], vocab_start, lse[rows], scale, form)
        product_(dxn[rows], d_logits, w_chunk, accumulate=accumulate_dxn)
        if dw_chunk is not None:
            product_(dw_chunk, d_logits.T, xn[rows], accumulate=accumulate_dw or rows.start > 0)


def head_loss_and_grad(
    xn: Tensor,
    w: Tensor,
    targets: Tensor,
    scale: float,
    loss: Tensor,
    dxn: Tensor,
    dw: Tensor | None,
    *,
    accumulate_dw: bool,
    tile: int,
    form: LossForm = PLAIN,
) -> None:
    """Loss and gradients where ``w`` [V, h] is the whole output matrix: every tile is made once.

    The arguments are those of :func:`head_stats`, :func:`head_loss` and :func:`head_grad`; ``dxn``
    is overwritten.
    """
    stats = HeadStats.start(len(xn), xn.device)
    for rows, logits in _tiles(xn, w, tile):
        tile_stats = stats.part(rows)
        lse_accumulate(logits, targets[rows], 0, *tile_stats, form)
        lse = lse_finish(tile_stats.running_max, tile_stats.running_sum)
        d_logits = softmax_grad_(logits, targets[rows], 0, lse, scale, form)
        product_(dxn[rows], d_logits, w, accumulate=False)
        if dw is not None:
            product_(dw, d_logits.T, xn[rows], accumulate=accumulate_dw or rows.start > 0)
    head_loss(stats, targets, scale, loss, form)


def _tiles(xn: Tensor, w_chunk: Tensor, tile: int) -> Iterator[tuple[slice, Tensor]]:
    """Token rows and their logits, tile by tile; all tiles share one buffer."""
    tokens = len(xn)
    buffer = xn.new_empty(min(tile, tokens), len(w_chunk))
    for start in range(0, tokens, tile):
        rows = slice(start, min(start + tile, tokens))
        logits = buffer[: rows.stop - start]
        torch.mm(xn[rows], w_chunk.T, out=logits)
        yield rows, logits
