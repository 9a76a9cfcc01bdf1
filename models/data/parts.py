"""The tokenised documents of one source, cut to the sequence length, in memory or on disk."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import numpy as np
from numpy.typing import NDArray

from slideformer.models.data.cache import Tokens, release

_SCAN_TOKENS = 1 << 22
"""Tokens looked at together when targets are counted: it bounds the memory that this takes."""


@dataclass(frozen=True, eq=False)
class Part:
    """Documents of one source, in flat arrays that parts may share.

    Document d is ``tokens.ids[starts[d]:starts[d] + lengths[d]]``. Its first token is never learnt,
    whatever its label, since nothing precedes it. starts, lengths, cut: int64 [documents];
    ``cut`` counts the tokens of each document that did not fit the sequence length. ``weight``: how
    often an epoch shows each.
    """

    source: str
    tokens: Tokens
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    cut: NDArray[np.int64]
    weight: float

    def __len__(self) -> int:
        """The number of documents, those without a target included."""
        return len(self.starts)

    def read(self, documents: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """The documents of these numbers, one after another: ids, and which of them are learnt."""
        lengths = self.lengths[documents]
        position = counted(lengths)
        at = position + np.repeat(self.starts[documents], lengths)
        ids, learnt = self.tokens.ids[at], self.tokens.labels[at] & (position > 0)
        self._release()
        return ids, learnt

    def _release(self) -> None:
        """Let go of what was read, so that the process holds no more of the files than a batch."""
        release(self.tokens.ids)
        release(self.tokens.labels)

    @cached_property
    def targets(self) -> NDArray[np.int64]:
        """How many tokens of each document are learnt, int64 [documents]."""
        found = np.zeros(len(self), dtype=np.int64)
        first = 0
        while first < len(self):
            # Documents lie in the order of their numbers, so a span of them is a span of labels.
            begin = self.starts[first]
            last = int(np.searchsorted(self.starts, begin + _SCAN_TOKENS, side="left"))
            last = max(last, first + 1)
            starts, lengths = self.starts[first:last] - begin, self.lengths[first:last]
            labels = self.tokens.labels[begin : begin + starts[-1] + lengths[-1]]
            learnt = np.zeros(len(labels) + 1, dtype=np.int64)
            np.cumsum(labels, out=learnt[1:])
            found[first:last] = learnt[starts + lengths] - learnt[starts + np.minimum(lengths, 1)]
            first = last
            self._release()
        return found

    def select(self, chosen: NDArray[np.bool_]) -> Self:
        """The documents that are marked, in the same order."""
        return replace(
            self, starts=self.starts[chosen], lengths=self.lengths[chosen], cut=self.cut[chosen]
        )


def counted(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """0 … n − 1 for each length n, one after another."""
    starts = np.cumsum(lengths) - lengths
    numbers: NDArray[np.int64] = np.arange(int(lengths.sum())) - np.repeat(starts, lengths)
    return numbers


def part_of(
    ids: NDArray[np.int32],
    offsets: NDArray[np.int64],
    labels: NDArray[np.bool_],
    *,
    seq_len: int,
) -> Part:
    """A part of whole documents ``ids[offsets[d]:offsets[d + 1]]``, each cut at ``seq_len``."""
    assert len(ids) == len(labels) == offsets[-1]
    tokens = Tokens(ids.view(), labels.view(), offsets, int(ids.max(initial=0)), "")
    for held in (tokens.ids, tokens.labels):
        held.flags.writeable = False
    return part_from(tokens, seq_len=seq_len)


def part_from(
    tokens: Tokens, *, seq_len: int, text: bool = False, source: str = "data set", weight: float = 1
) -> Part:
    """A part of documents cut at ``seq_len``; a ``text`` makes consecutive ones of that length."""
    bounds = tokens.offsets
    if text:
        bounds = np.append(np.arange(0, len(tokens.ids), seq_len), len(tokens.ids))
    whole = np.diff(bounds)
    assert not len(whole) or whole.min() >= 0
    lengths = np.minimum(whole, seq_len)
    return Part(source, tokens, bounds[:-1], lengths, whole - lengths, weight)
