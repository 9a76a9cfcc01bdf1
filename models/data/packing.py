"""Packing: which documents share a row.

Best-fit decreasing: documents go, the longest first, into the row that they fill best. Rows of
whole documents lose almost nothing to padding on common mixes of lengths, without cutting any
(Ding et al., Fewer Truncations Improve Language Modeling, arXiv 2404.10830).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Rows:
    """Documents in rows: row r holds ``documents[starts[r]:starts[r + 1]]``, both int64."""

    documents: NDArray[np.int64]
    starts: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def take(self, numbers: NDArray[np.int64]) -> Rows:
        """The rows of those numbers, in that order."""
        counts = self.starts[numbers + 1] - self.starts[numbers]
        starts = np.zeros(len(numbers) + 1, dtype=np.int64)
        np.cumsum(counts, out=starts[1:])
        at = np.arange(starts[-1]) + np.repeat(self.starts[numbers] - starts[:-1], counts)
        return Rows(self.documents[at], starts)


def one_each(count: int) -> Rows:
    """A row for each of ``count`` documents."""
    return Rows(np.arange(count), np.arange(count + 1))


def joined(several: Sequence[Rows], firsts: NDArray[np.int64]) -> Rows:
    """The rows of several lists, whose documents are numbered from ``firsts[list]`` on."""
    documents = [rows.documents + first for rows, first in zip(several, firsts, strict=True)]
    counts = [np.diff(rows.starts) for rows in several]
    return Rows(np.concatenate(documents), np.append(0, np.cumsum(np.concatenate(counts))))


def pack(lengths: NDArray[np.int64], capacity: int) -> Rows:
    """Put documents of ``lengths`` tokens, each at most ``capacity``, into rows of that size.

    Documents without a token are left out. The result depends on the arguments alone.
    """
    assert not len(lengths) or lengths.max() <= capacity
    order = np.argsort(-lengths, kind="stable")
    order = order[lengths[order] > 0]
    row_of = np.empty(len(order), dtype=np.int64)
    rows = 0
    room: dict[int, list[int]] = {}  # free tokens → rows with as many
    free: list[int] = []  # the keys of room, ascending
    for place, length in enumerate(lengths[order].tolist()):
        at = bisect_left(free, length)
        if at == len(free):
            row, left = rows, capacity - length
            rows += 1
        else:
            found = room[free[at]]
            row, left = found.pop(), free[at] - length
            if not found:
                del room[free.pop(at)]
        row_of[place] = row
        if left:
            if left not in room:
                insort(free, left)
                room[left] = []
            room[left].append(row)
    documents = order[np.argsort(row_of, kind="stable")]
    starts = np.zeros(rows + 1, dtype=np.int64)
    np.cumsum(np.bincount(row_of, minlength=rows), out=starts[1:])
    return Rows(documents, starts)


def padding_share(tokens: float, rows: float, seq_len: int) -> float:
    """The share of ``rows`` of ``seq_len`` tokens that ``tokens`` do not fill; 0 without rows."""
    return 1 - tokens / (rows * seq_len) if rows else 0.0
