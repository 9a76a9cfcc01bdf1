"""Orders drawn from a seed, the same in every version of numpy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# Second words of the seeds; epochs, which stand in their place, are smaller.
_SPLIT = 2**32 - 1
_PASS = 2**32 - 2


def shuffled(count: int, *seed: int) -> NDArray[np.int64]:
    """The numbers below ``count`` in an order that the words of ``seed`` decide; int64 [count]."""
    # Raw bits of a bit generator are the same in every version of numpy; those of
    # Generator.permutation are not promised to be.
    bits = np.random.PCG64(np.random.SeedSequence(seed))
    return np.argsort(bits.random_raw(count), kind="stable")


def split_off(count: int, share: float, seed: int) -> NDArray[np.bool_]:
    """Marks the documents to set aside, ``share`` of all ``count``, rounded, but one at least."""
    aside = np.zeros(count, dtype=np.bool_)
    aside[shuffled(count, seed, _SPLIT)[: max(1, round(share * count))]] = True
    return aside


def epoch_rows(rows: int, weight: float, seed: int, part: int, epoch: int) -> NDArray[np.int64]:
    """Which of the rows of a part an epoch shows, ascending, ``weight`` times as many as there are.

    The part's rows go round and round, shuffled anew each time, and an epoch takes those that are
    next. So after any number of epochs, no row was shown more than once oftener than another.
    """
    if not rows:
        return np.empty(0, dtype=np.int64)
    count = max(1, round(weight * rows))
    if count == rows:  # a whole round, so its order does not matter
        return np.arange(rows)
    number, at = divmod(epoch * count, rows)
    taken: list[NDArray[np.int64]] = []
    while count > 0:
        taken.append(shuffled(rows, seed, _PASS, part, number)[at : at + count])
        count -= len(taken[-1])
        number, at = number + 1, 0
    return np.sort(np.concatenate(taken))
