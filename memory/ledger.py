"""Adds up what is in use per tier: a judge of plans that shares no code with the planner."""

from __future__ import annotations

from collections.abc import Mapping

from slideformer.graph.buffers import Tier
from slideformer.graph.errors import BudgetError
from slideformer.graph.graph import TaskGraph


class Ledger:
    """Who holds how many bytes of which tier; refuses what would exceed a tier's capacity."""

    def __init__(self, capacity: Mapping[Tier, int] | None = None) -> None:
        self._capacity = capacity or {}
        self._held: dict[str, tuple[Tier, int]] = {}
        self.usage: dict[Tier, int] = dict.fromkeys(Tier, 0)
        self.peak: dict[Tier, int] = dict.fromkeys(Tier, 0)

    def take(self, name: str, tier: Tier, nbytes: int) -> None:
        """``name`` now holds ``nbytes`` of ``tier``; raises `BudgetError` if they do not fit."""
        if name in self._held:
            raise BudgetError(f"{name} already holds {self._held[name][1]} bytes")
        capacity = self._capacity.get(tier)
        if capacity is not None and self.usage[tier] + nbytes > capacity:
            largest = sorted((h for h in self._held.items() if h[1][0] is tier), key=_size)[-3:]
            held = ", ".join(f"{n} {size:,}" for n, (_, size) in reversed(largest)) or "nothing"
            raise BudgetError(
                f"{tier} budget is {capacity:,} bytes: {name} needs {nbytes:,}, "
                f"{self.usage[tier]:,} are held (largest: {held})"
            )
        self._held[name] = (tier, nbytes)
        self.usage[tier] += nbytes
        self.peak[tier] = max(self.peak[tier], self.usage[tier])

    def give(self, name: str) -> None:
        """``name`` holds nothing any more."""
        tier, nbytes = self._held.pop(name)
        self.usage[tier] -= nbytes


def _size(holding: tuple[str, tuple[Tier, int]]) -> int:
    return holding[1][1]


def replay(graph: TaskGraph, capacity: Mapping[Tier, int] | None = None) -> Ledger:
    """Play a graph in program order and add up every tier.

    Slots and carried buffers are held throughout, other buffers from first to last access.
    """
    ledger = Ledger(capacity)
    for slot in graph.slots.values():
        ledger.take(slot.name, slot.tier, slot.nbytes)
    last: dict[str, int] = {}
    for position, task in enumerate(graph.tasks):
        for name in (*task.reads, *task.writes):
            last[name] = position
    loose = {b.name: b for b in graph.buffers.values() if not b.slot}
    for buffer in loose.values():
        if buffer.carried:
            ledger.take(buffer.name, buffer.tier, buffer.nbytes)
    held: set[str] = set()
    for position, task in enumerate(graph.tasks):
        names = [n for n in dict.fromkeys((*task.reads, *task.writes)) if n in loose]
        for name in names:
            if not loose[name].carried and name not in held:
                held.add(name)
                ledger.take(name, loose[name].tier, loose[name].nbytes)
        for name in names:
            if name in held and last[name] == position:
                ledger.give(name)
    return ledger
