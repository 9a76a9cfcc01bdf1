"""Weight slots: every visit finds its weight, and few weights are loaded again."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from slideformer.graph.errors import BudgetError
from slideformer.graph.placing import SlotPool, place_weights

visits = st.lists(st.integers(0, 7), max_size=30)
windows = st.integers(1, 5)


def fifo_loads(sequence: list[int], window: int) -> int:
    """Loads if what came first goes first."""
    held: deque[int] = deque(maxlen=window)
    loads = 0
    for weight in sequence:
        if weight not in held:
            held.append(weight)
            loads += 1
    return loads


def fewest_loads(sequence: list[int], window: int) -> int:
    """The least loads of any choice of evictions, by trying all reachable sets of held weights."""
    costs: dict[frozenset[int], int] = {frozenset(): 0}
    for weight in sequence:
        following: dict[frozenset[int], int] = {}
        for held, cost in costs.items():
            options = [(held, cost)]
            if weight not in held:
                kept = [held] if len(held) < window else [held - {w} for w in held]
                options = [(k | {weight}, cost + 1) for k in kept]
            for option, paid in options:
                following[option] = min(paid, following.get(option, paid))
        costs = following
    return min(costs.values())


@given(visits, windows)
def test_every_visit_finds_its_weight(sequence: list[int], window: int) -> None:
    slots: dict[int, int] = {}
    placed = place_weights(sequence, window)
    assert len(placed) == len(sequence)
    for weight, visit in zip(sequence, placed, strict=True):
        assert 0 <= visit.slot < window
        assert visit.load == (weight not in slots.values()), (
            "loaded when and only when it is absent"
        )
        if visit.load:
            slots[visit.slot] = weight
        assert slots[visit.slot] == weight


@given(visits, windows)
def test_no_more_loads_than_first_in_first_out(sequence: list[int], window: int) -> None:
    assert sum(v.load for v in place_weights(sequence, window)) <= fifo_loads(sequence, window)


@given(st.lists(st.integers(0, 5), max_size=12), st.integers(1, 3))
def test_no_choice_of_evictions_needs_fewer_loads(sequence: list[int], window: int) -> None:
    loads = sum(visit.load for visit in place_weights(sequence, window))
    assert loads == fewest_loads(sequence, window)


def test_forward_and_backward_keep_the_last_layers() -> None:
    layers = list(range(6))
    placed = place_weights([*layers, *reversed(layers)], 3)
    backward = placed[6:]
    assert [visit.load for visit in backward] == [False, False, False, True, True, True]


def test_in_backward_a_load_takes_the_slot_idle_for_longest() -> None:
    layers = list(range(8))
    placed = place_weights([*layers, *reversed(layers)], 3)
    for position in range(9, 16):
        if placed[position].load:
            assert placed[position].slot != placed[position - 1].slot
            assert placed[position].slot != placed[position - 2].slot


def test_a_pool_hands_out_the_slot_idle_for_longest() -> None:
    pool = SlotPool("x", 3)
    first, second, third = (pool.acquire() for _ in range(3))
    assert pool.names() == [first, second, third] == ["x.0", "x.1", "x.2"]
    pool.release(second)
    pool.release(first)
    assert [pool.acquire(), pool.acquire()] == [second, first]


def test_a_full_pool_says_so() -> None:
    pool = SlotPool("x", 1)
    pool.acquire()
    with pytest.raises(BudgetError, match="all 1 x slots"):
        pool.acquire()


@given(st.lists(st.booleans(), max_size=30))
def test_an_open_pool_grows_to_the_most_in_use(takes: list[bool]) -> None:
    pool = SlotPool("x", None)
    in_use: list[str] = []
    most = 0
    for take in takes:
        if take:
            slot = pool.acquire()
            assert slot not in in_use
            in_use.append(slot)
            most = max(most, len(in_use))
        elif in_use:
            pool.release(in_use.pop(0))
    assert len(pool.names()) == most
    assert set(in_use) <= set(pool.names())


class PoolAgainstQueue(RuleBasedStateMachine):
    """Whatever is taken and given back: no slot is taken twice, the longest idle comes first."""

    @initialize(size=st.none() | st.integers(0, 4))
    def begin(self, size: int | None) -> None:
        """A pool of that many slots, or one that grows."""
        self.pool, self.size = SlotPool("x", size), size
        self.idle = deque(f"x.{i}" for i in range(size or 0))
        self.taken: list[str] = []
        self.most = 0

    @rule()
    def acquire(self) -> None:
        """Take a slot, which works if one is idle or the pool grows."""
        if not self.idle and self.size is not None:
            with pytest.raises(BudgetError, match=f"all {self.size} x slots"):
                self.pool.acquire()
            return
        slot = self.pool.acquire()
        assert slot not in self.taken
        assert slot == (self.idle.popleft() if self.idle else f"x.{self.most}")
        self.taken.append(slot)
        self.most = max(self.most, len(self.taken))

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        """Give any slot back."""
        slot = data.draw(st.sampled_from(self.taken))
        self.taken.remove(slot)
        self.idle.append(slot)
        self.pool.release(slot)

    @invariant()
    def names_are_all_slots(self) -> None:
        """A fixed pool has its size, a growing one the most that were taken at once."""
        count = self.most if self.size is None else self.size
        assert self.pool.names() == [f"x.{i}" for i in range(count)]
        assert sorted([*self.taken, *self.idle]) == sorted(self.pool.names())


TestPoolAgainstQueue = PoolAgainstQueue.TestCase
