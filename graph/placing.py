"""Which slot each buffer occupies: weight slots by furthest next use, boundaries by a pool."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from typing import NamedTuple

from slideformer.graph.errors import BudgetError


class Visit(NamedTuple):
    """One visit of a weight: the slot it is found in and whether it must be loaded first."""

    slot: int
    load: bool


def place_weights(visits: Sequence[Hashable], window: int) -> list[Visit]:
    """Assign ``window`` slots to a sequence of visited weights so that few must be loaded again.

    Evicts what is needed furthest in the future (Belady 1966). Ties, which in backward are the
    rule since nothing is needed again, go to the slot idle for longest: taking the newest instead
    would make each load wait for the computation just before it.
    """
    next_use: list[int] = [len(visits)] * len(visits)
    seen: dict[Hashable, int] = {}
    for position in reversed(range(len(visits))):
        next_use[position] = seen.get(visits[position], len(visits))
        seen[visits[position]] = position
    held: list[Hashable | None] = [None] * window
    needed = [len(visits)] * window
    used = list(range(-window, 0))
    placed: list[Visit] = []
    for position, weight in enumerate(visits):
        load = weight not in held
        if load:
            slot = max(range(window), key=lambda s: (needed[s], -used[s]))
        else:
            slot = held.index(weight)
        held[slot], needed[slot], used[slot] = weight, next_use[position], position
        placed.append(Visit(slot, load))
    return placed


class SlotPool:
    """Equal slots handed out in program order, the one idle for longest first.

    With ``size`` None it grows as needed; `names` then tells how many slots the program needs.
    """

    def __init__(self, prefix: str, size: int | None) -> None:
        self._prefix = prefix
        self._size = size
        self._free: deque[str] = deque()
        if size is not None:
            self._free.extend(f"{prefix}.{i}" for i in range(size))
        self._made = size or 0

    def acquire(self) -> str:
        """Name of a free slot; raises `BudgetError` if all are taken."""
        if self._free:
            return self._free.popleft()
        if self._size is not None:
            raise BudgetError(
                f"all {self._size} {self._prefix} slots are occupied; the plan needs more of them"
            )
        self._made += 1
        return f"{self._prefix}.{self._made - 1}"

    def release(self, slot: str) -> None:
        """Give a slot back."""
        self._free.append(slot)

    def names(self) -> list[str]:
        """All slots, in use or not."""
        return [f"{self._prefix}.{i}" for i in range(self._made)]
