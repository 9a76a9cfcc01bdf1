"""What NVMe spares the host, in the order in which things go there: the *chain*.

First the moments of layer after layer, then the lower halves of their masters, then boundaries,
then the upper halves. Each is written and read once a step, upper halves are read twice, so fewer
bytes are always faster. A plan has taken so many *steps* along the chain.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from slideformer.graph.chunks import chunk_unit
from slideformer.graph.model import ModelSpec, UnitSpec
from slideformer.graph.plan import Budgets, Compute, MemoryPlan
from slideformer.graph.state import state_nbytes
from slideformer.graph.step_nvme import HI, LO, MOMENTS, extent_nbytes, kind_parts, spread
from slideformer.memory.layout import Ints, aligned

_HALF = 2
"""Bytes per element of an upper or lower half."""


def nvme_room(budgets: Budgets) -> int:
    """Most bytes that may be there: by space, and by what a step may write."""
    return budgets.nvme if budgets.nvme_writes is None else min(budgets.nvme, budgets.nvme_writes)


class Stored(NamedTuple):
    """Layers of which a part is on NVMe, as in `MemoryPlan`; ints or arrays."""

    moments: Ints
    lo: Ints
    boundaries: Ints
    hi: Ints


class Sizes(NamedTuple):
    """What plans gain by NVMe: host bytes spared, bytes on NVMe, bytes read from it in a step."""

    spared: Ints
    nbytes: Ints
    read: Ints

    def at(self, where: int | Ints) -> Sizes:
        """Those that an index selects."""
        return Sizes(*(each[where] for each in self))


class StateSizes:
    """Sizes along the chain's parts that are state, with the same ``resident`` units.

    ``low``: by steps of moments and lower halves; ``high``: with all of these, by upper halves. As
    all bases cut layers alike, ``base`` may be any.
    """

    def __init__(self, spec: ModelSpec, base: MemoryPlan, resident: frozenset[str]) -> None:
        units = [u for u in spec.layers if u.name not in resident and not u.frozen]
        layers, n = _Layers(spec, base, units), len(units)
        halves = base.compute is Compute.BF16  # FP32 compute reads both in every pass
        steps = [(i, 0) for i in range(n + 1)] + [(n, i) for i in range(1, n + 1) if halves]
        self.layers = n
        self.low = _stack([layers.sizes(moments, lo, 0) for moments, lo in steps])
        highs = range(n + 1 if halves else 1)
        self.high = _stack([layers.sizes(*steps[-1], hi) for hi in highs])


class Chain:
    """The chain of plans with the same resident units on a base.

    How many layers' boundaries may go there depends on the plan: each method takes that number.
    """

    def __init__(self, spec: ModelSpec, base: MemoryPlan, sizes: StateSizes) -> None:
        boundary = base.micro_tokens * spec.hidden * base.compute.nbytes
        self._own = aligned(base.micro_batches * boundary)
        self._away = base.micro_batches * aligned(boundary)
        direct = base.nvme_direct and aligned(boundary) == boundary
        self._ring = 0 if direct else base.nvme_slots * aligned(boundary)
        self._streamed, self._state, self._high = sizes.layers, sizes.low, sizes.high
        self._states = len(sizes.low.nbytes) - 1

    @property
    def steps(self) -> int:
        """Steps of the chain, those of boundaries not counted."""
        return self._states + len(self._high.nbytes) - 1

    def stored(self, steps: Ints, boundaries: Ints) -> Stored:
        """What is on NVMe after so many steps, of at most so many layers' ``boundaries``."""
        rest = np.maximum(steps - self._states, 0)
        state = np.minimum(steps, self._states)
        moments = np.minimum(state, self._streamed)
        away = np.minimum(rest, boundaries)
        return Stored(moments, state - moments, away, rest - away)

    def sizes(self, stored: Stored) -> Sizes:
        """What that gains."""
        state = self._state.at(stored.moments + stored.lo)
        high = self._high.at(stored.hi)
        away, far = stored.boundaries * self._own, stored.boundaries * self._away
        spared = np.where(stored.hi > 0, high.spared, state.spared)
        nbytes = np.where(stored.hi > 0, high.nbytes, state.nbytes) + far
        read = np.where(stored.hi > 0, high.read, state.read) + far
        return Sizes(spared + away - (away > 0) * self._ring, nbytes, read)

    def fewest(self, wanted: Ints, boundaries: Ints, room: int) -> Ints:
        """The fewest steps that spare each number of bytes wanted within ``room``, or -1."""
        found = _first(self._state, wanted, np.full_like(wanted, room))
        if int(self._state.nbytes[-1]) > room:
            return found
        # All state is there: then boundaries,
        missing = wanted - int(self._state.spared[-1]) + self._ring
        number = -(-missing // self._own)
        fits = (number <= boundaries) & (self._state.nbytes[-1] + number * self._away <= room)
        found = np.where((found < 0) & fits, self._states + number, found)
        # and with all of these, upper halves.
        away = boundaries * self._own
        missing = wanted - away + (away > 0) * self._ring
        high = _first(self._high, missing, room - boundaries * self._away)
        return np.where((found < 0) & (high > 0), self._states + boundaries + high, found)

    def most_spared(self, boundaries: Ints, room: int) -> Ints:
        """The most bytes of host memory that can be spared within ``room`` bytes."""
        best = np.full_like(boundaries, int(_best(self._state, np.array(room))))
        if int(self._state.nbytes[-1]) > room:
            return best
        number = np.minimum(boundaries, (room - int(self._state.nbytes[-1])) // self._away)
        away = number * self._own
        spared = int(self._state.spared[-1]) + away - (away > 0) * self._ring
        best = np.maximum(best, spared)
        away, left = boundaries * self._own, room - boundaries * self._away
        high = _best(self._high, left) + away - (away > 0) * self._ring
        most: Ints = np.where(left >= self._high.nbytes[0], np.maximum(best, high), best)
        return most


def _first(sizes: Sizes, wanted: Ints, room: Ints) -> Ints:
    """The first index that spares each number wanted within its room, or -1."""
    best = np.maximum.accumulate(sizes.spared)
    found = np.searchsorted(best, wanted, side="left")
    last = len(best) - 1
    fits = (found <= last) & (sizes.nbytes[np.minimum(found, last)] <= room)
    return np.where(fits, found, -1)


def _best(sizes: Sizes, room: Ints) -> Ints:
    """The most spared within each room, if that is enough for the first."""
    best = np.maximum.accumulate(sizes.spared)
    fits = np.searchsorted(sizes.nbytes, room, side="right") - 1
    spared: Ints = best[np.maximum(fits, 0)]
    return spared


def _stack(sizes: list[tuple[int, int, int]]) -> Sizes:
    return Sizes(*np.array(sizes, np.int64).T)


_KINDS = ((MOMENTS,), (MOMENTS, LO), (MOMENTS, LO, HI), (HI,))
"""Kinds of what shares a slot in host memory."""


class _Layers:
    """Sizes of the layers whose state can go to NVMe."""

    def __init__(self, spec: ModelSpec, base: MemoryPlan, units: list[UnitSpec]) -> None:
        self._slots, self._deferred = base.nvme_slots, base.deferred
        rows = []
        for unit in units:
            chunks = chunk_unit(spec, unit, base.chunk_numel, base.vocab_chunks)
            parts = {kind: kind_parts(kind, unit, base.optimizer) for kind in (MOMENTS, LO, HI)}
            extents = [[extent_nbytes(each, c.numel) for c in chunks] for each in parts.values()]
            largest = [
                max(sum(extent_nbytes(parts[kind], c.numel) for kind in kinds) for c in chunks)
                for kinds in _KINDS
            ]
            half = aligned(_HALF * unit.numel)
            rest = aligned(state_nbytes(unit, base)) - half
            rows.append([half, *map(sum, extents), *largest, rest])
        self._rows: Ints = np.array(rows, np.int64).reshape(-1, 9)

    def sizes(self, moments: int, lo: int, hi: int) -> tuple[int, int, int]:
        """What so many layers' parts spare the host, take, and are read in a step."""
        with_moments = self._rows[spread(range(len(self._rows)), moments)]
        with_lo = with_moments[spread(range(moments), lo)]
        with_hi = with_lo[spread(range(lo), hi)]
        spared = nbytes = largest = 0
        for kind, rows in enumerate((with_moments, with_lo, with_hi)):
            half = rows[:, 0]
            spared += int(rows[:, 0 if kind else 8].sum())
            nbytes += int(rows[:, 1 + kind].sum())
            largest = max(largest, int(rows[:, 4 + kind].max(initial=0)))
            if kind:  # where a unit's halves are put together to be saved
                spared -= int(half.max(initial=0))
        largest += int(with_hi[:, 7].max(initial=0))  # on their way up
        again = int(with_hi[:, 3].sum()) * (2 if self._deferred else 1)
        return spared - self._slots * largest, nbytes, nbytes + again
