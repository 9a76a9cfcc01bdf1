"""Rows that hold several documents: where each starts, and the position of every token in its own.

A *document* is a run of tokens whose positions count up from 0. Documents lie one after another in
the tokens of a micro-batch; attention does not cross from one to another. Padding at the end of a
row is a document of its own, so that no real token sees it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Documents(NamedTuple):
    """The documents of one micro-batch, as attention in a layer of one window needs them.

    ``starts`` int32 [n + 1], on the device, holds where each of n documents starts in the
    micro-batch's tokens, and their number. ``lengths`` are the same on the host. ``window`` is the
    layer's sliding window, None if it has none.
    """

    starts: Tensor
    lengths: tuple[int, ...]
    window: int | None


class PackedTensors(NamedTuple):
    """Views of a step's buffer: ``positions`` int32 [T], ``starts`` int32 [M, T / M + 1]."""

    positions: Tensor
    starts: Tensor


@dataclass(frozen=True)
class StepDocuments:
    """A step's ``positions`` int32 [T] and the lengths of its documents, per micro-batch."""

    positions: Tensor
    lengths: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, positions: Tensor, micro_batches: int) -> StepDocuments:
        """From the positions of a batch, int64 [B, S], cut into micro-batches of whole rows."""
        flat = positions.reshape(-1)
        parts = flat.view(micro_batches, -1)
        ends = torch.tensor([parts.shape[1]])
        lengths = tuple(
            tuple(torch.diff((part == 0).nonzero().view(-1), append=ends).tolist())
            for part in parts
        )
        return cls(flat.to(torch.int32), lengths)

    def write(self, target: PackedTensors) -> None:
        """Fill the host's buffer; of each micro-batch's starts only the first ones are written."""
        target.positions.copy_(self.positions)
        for starts, lengths in zip(target.starts, self.lengths, strict=True):
            starts[0] = 0
            starts[1 : len(lengths) + 1] = torch.tensor(lengths, dtype=torch.int32).cumsum(0)


def packed_tensors(view: Tensor, tokens: int, micro_batches: int) -> PackedTensors:
    """The parts of a step's buffer, uint8 [4 · (2·T + M)], for T tokens in M micro-batches."""
    positions, starts = view.view(torch.int32).split([tokens, tokens + micro_batches])
    return PackedTensors(positions, starts.view(micro_batches, -1))
