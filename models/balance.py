"""The loss that balances the load of experts (Fedus et al., Switch Transformer, arXiv 2101.03961).

    c · E · Σ over experts of f · p

with f the share of routed tokens that an expert got times k, and p the mean of its probability,
both over all tokens and layers of a step, as ``load_balancing_loss_func`` of transformers takes
them over one forward. Forward adds up the statistics of each layer and micro-batch; when all are
known, each layer's backward gets the gradient of its probabilities from them. The shares f are
counts and have no gradient. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from slideformer.kernels.reference import IGNORE_INDEX
from slideformer.models.documents import packed_tensors
from slideformer.models.model_memory import ModelMemory, Views


class Balance(NamedTuple):
    """What a step knows of its experts' load, and the tokens of one micro-batch that count."""

    statistics: Tensor
    """FP32 [2·E + 1]: routed tokens, and summed probabilities, of each expert; tokens times layers
    so far. On the device, shared by all layers and micro-batches."""
    real: Tensor
    """int32 [T]: 1 for a token that counts, 0 for padding."""
    coefficient: float
    """Weight of this loss, c."""

    def part(self, rows: slice) -> Balance:
        """The same for some of the tokens."""
        return Balance(self.statistics, self.real[rows], self.coefficient)

    def add(self, probabilities: Tensor, tokens: Tensor, ends: Tensor) -> None:
        """Count what one layer did: probabilities FP32 [T, E], the token of each sorted row int64
        [R], and the row behind each expert's last, int32 [E]."""
        routed = self.real[tokens].cumsum(0)
        routed = torch.cat((routed.new_zeros(1), routed))[ends.long()]
        counts = torch.diff(routed, prepend=routed.new_zeros(1))
        summed = (probabilities * self.real[:, None]).sum(0)
        self.statistics.add_(torch.cat((counts.float(), summed, self.real.sum()[None].float())))

    def gradient(self) -> Tensor:
        """Gradient of the loss by the probabilities of one layer, FP32 [T, E]."""
        counts, _, total = _parts(self.statistics)
        by_expert = counts * (self.coefficient * len(counts) / total.square())
        return self.real[:, None] * by_expert


def balance_loss(statistics: Tensor, coefficient: float) -> Tensor:
    """The loss once all layers were counted, FP32 scalar."""
    counts, summed, total = _parts(statistics)
    return (counts * summed).sum() * (coefficient * len(counts)) / total.square()[0]


def _parts(statistics: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    experts = (len(statistics) - 1) // 2
    counts, summed, total = statistics.split([experts, experts, 1])
    return counts, summed, total


def real_tokens(targets: Tensor, positions: Tensor) -> Tensor:
    """Which tokens count, int32 [T]; of ``targets`` int64 [T] and ``positions`` [T].

    Those up to the last that is learnt in their document, which starts where the position is 0:
    what is behind has no part in the step.
    """
    starts = positions == 0
    document = starts.cumsum(0)
    # Of each token, the document of the first target from there on.
    learnt = torch.where(targets != IGNORE_INDEX, document, len(document) + 1)
    following = learnt.flip(0).cummin(0).values.flip(0) == document
    # A target stands at the token before.
    return torch.where(starts, following, following.roll(1)).int()


def balance_of(memory: ModelMemory, views: Views, micro: int) -> Callable[[], Balance | None]:
    """Gives a task the load of experts and a micro-batch's tokens, or None where no loss asks."""
    experts = memory.decoder.experts
    if "balance" not in views or experts is None or experts.balance is None:
        return lambda: None
    statistics, coefficient = views["balance"].view(torch.float32), experts.balance
    tokens = memory.tokens(micro)
    targets = views["targets"].view(torch.int64)[tokens]
    if memory.plan.packed:
        packed = packed_tensors(views["documents"], memory.plan.tokens, memory.plan.micro_batches)
        positions = packed.positions[tokens]
    else:
        positions = torch.arange(len(targets), device=targets.device) % memory.plan.seq_len
    return lambda: Balance(statistics, real_tokens(targets, positions), coefficient)
