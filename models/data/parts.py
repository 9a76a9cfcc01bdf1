"""The tokenised documents of one source, cut to the sequence length."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, replace
from typing import Self, TypeVar

import numpy as np
from numpy.typing import NDArray

Scalar = TypeVar("Scalar", bound=np.generic)

_SCAN_TOKENS = 1 << 22
"""Tokens looked at together when targets are counted: it bounds the memory that this takes."""


@dataclass(frozen=True, eq=False)
class Part:
    """Documents of one source, in flat arrays that other parts may share.

    Document d is ``ids[starts[d]:starts[d] + lengths[d]]``. ids: int32 [tokens]. labels: bool
    [tokens], True where a token is learnt; a document's first token never is, whatever its label,
    since nothing precedes it. starts, lengths, cut: int64 [documents]; ``cut`` counts the tokens of
    each document that did not fit the sequence length. ``weight``: how often an epoch shows each.
    """

    source: str
    ids: NDArray[np.int32]
    labels: NDArray[np.bool_]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    cut: NDArray[np.int64]
    largest_id: int
    weight: float = 1.0

    def __len__(self) -> int:
        """The number of documents, those without a target included."""
        return len(self.starts)

    def read(self, documents: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """The documents of these numbers, one after another: ids, and which of them are learnt."""
        lengths = self.lengths[documents]
        position = counted(lengths)
        at = position + np.repeat(self.starts[documents], lengths)
        return self.ids[at], self.labels[at] & (position > 0)

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
            labels = self.labels[begin : begin + starts[-1] + lengths[-1]]
            learnt = np.zeros(len(labels) + 1, dtype=np.int64)
            np.cumsum(labels, out=learnt[1:])
            found[first:last] = learnt[starts + lengths] - learnt[starts + np.minimum(lengths, 1)]
            first = last
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
    source: str = "data set",
    weight: float = 1.0,
) -> Part:
    """A part of whole documents ``ids[offsets[d]:offsets[d + 1]]``, each cut at ``seq_len``."""
    assert len(ids) == len(labels) == offsets[-1]
    whole = np.diff(offsets)
    assert not len(whole) or whole.min() >= 0
    lengths = np.minimum(whole, seq_len)
    return Part(
        source, _read_only(ids), _read_only(labels), offsets[:-1], lengths, whole - lengths,
        int(ids.max(initial=0)), weight,
    )  # fmt: skip


def part_of_text(
    ids: NDArray[np.int32], *, seq_len: int, source: str = "data set", weight: float = 1.0
) -> Part:
    """A part of one long text: documents of ``seq_len`` tokens and a last one with the rest."""
    bounds = np.append(np.arange(0, len(ids), seq_len), len(ids))
    learnt = np.broadcast_to(np.True_, len(ids))
    return part_of(ids, bounds, learnt, seq_len=seq_len, source=source, weight=weight)


class PartBuilder:
    """Grows a part; byte arrays grow in place, so the tokens are never held twice."""

    def __init__(self) -> None:
        self._ids = bytearray()
        self._labels = bytearray()
        self._lengths = array("q")

    def add(self, ids: NDArray[np.int32], labels: NDArray[np.bool_]) -> None:
        """One more document."""
        self._ids += ids.tobytes()
        self._labels += labels.tobytes()
        self._lengths.append(len(ids))

    def build(self, *, seq_len: int, source: str, weight: float) -> Part:
        """The part of all documents."""
        offsets = np.zeros(len(self._lengths) + 1, dtype=np.int64)
        np.cumsum(np.frombuffer(self._lengths, dtype=np.int64), out=offsets[1:])
        ids = np.frombuffer(self._ids, dtype=np.int32)
        labels = np.frombuffer(self._labels, dtype=np.bool_)
        return part_of(ids, offsets, labels, seq_len=seq_len, source=source, weight=weight)


def _read_only(held: NDArray[Scalar]) -> NDArray[Scalar]:
    view = held.view()
    view.flags.writeable = False
    return view
