"""The ledger against a plain dictionary, and its replay of graphs against byte counting."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from slideformer.graph.buffers import Tier
from slideformer.graph.errors import BudgetError
from slideformer.graph.graph import TaskGraph
from slideformer.memory.ledger import Ledger, replay
from tests.support.graphs import task_graphs

CAPACITY = {Tier.GPU: 10, Tier.PINNED: 5}
names = st.sampled_from("abcdef")


class LedgerAgainstDict(RuleBasedStateMachine):
    """Whatever is taken and given, usage is the sum of what is held."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger(CAPACITY)
        self.held: dict[str, tuple[Tier, int]] = {}
        self.peak = dict.fromkeys(Tier, 0)

    def used(self, tier: Tier) -> int:
        """Bytes held of a tier."""
        return sum(nbytes for t, nbytes in self.held.values() if t is tier)

    @rule(name=names, tier=st.sampled_from(Tier), nbytes=st.integers(0, 6))
    def take(self, name: str, tier: Tier, nbytes: int) -> None:
        """Take, which works if the name is free and there is room."""
        full = self.used(tier) + nbytes > CAPACITY.get(tier, 10**9)
        if name in self.held:
            with pytest.raises(BudgetError, match=f"{name} already holds {self.held[name][1]}"):
                self.ledger.take(name, tier, nbytes)
        elif full:
            with pytest.raises(BudgetError, match=f"{tier} budget is {CAPACITY[tier]} bytes"):
                self.ledger.take(name, tier, nbytes)
        else:
            self.ledger.take(name, tier, nbytes)
            self.held[name] = (tier, nbytes)
            self.peak[tier] = max(self.peak[tier], self.used(tier))

    @precondition(lambda self: bool(self.held))
    @rule(data=st.data())
    def give(self, data: st.DataObject) -> None:
        """Give something back."""
        name = data.draw(st.sampled_from(sorted(self.held)))
        self.ledger.give(name)
        del self.held[name]

    @invariant()
    def sums_agree(self) -> None:
        """Usage and peak, tier by tier."""
        assert self.ledger.usage == {tier: self.used(tier) for tier in Tier}
        assert self.ledger.peak == self.peak


TestLedgerAgainstDict = LedgerAgainstDict.TestCase


def test_a_refusal_names_who_holds_most() -> None:
    ledger = Ledger({Tier.GPU: 10})
    for name, nbytes in (("small", 1), ("large", 5), ("medium", 3)):
        ledger.take(name, Tier.GPU, nbytes)
    with pytest.raises(BudgetError) as raised:
        ledger.take("more", Tier.GPU, 2)
    assert "more needs 2, 9 are held (largest: large 5, medium 3, small 1)" in str(raised.value)


@given(task_graphs())
def test_a_replay_counts_what_is_alive(graph: TaskGraph) -> None:
    accesses: dict[str, list[int]] = {}
    for position, task in enumerate(graph.tasks):
        for name in (*task.reads, *task.writes):
            accesses.setdefault(name, []).append(position)
    always = dict.fromkeys(Tier, 0)
    for slot in graph.slots.values():
        always[slot.tier] += slot.nbytes
    loose = [b for b in graph.buffers.values() if not b.slot]
    for buffer in loose:
        always[buffer.tier] += buffer.nbytes if buffer.carried else 0
    peak = dict(always)
    for position in range(len(graph.tasks)):
        usage = dict(always)
        for buffer in loose:
            at = accesses.get(buffer.name, [])
            if not buffer.carried and at and at[0] <= position <= at[-1]:
                usage[buffer.tier] += buffer.nbytes
        peak = {tier: max(peak[tier], usage[tier]) for tier in Tier}
    ledger = replay(graph)
    assert ledger.peak == peak
    assert ledger.usage == always, "in the end only slots and carried buffers are held"
    replay(graph, peak)
    for tier in Tier:
        if peak[tier]:
            with pytest.raises(BudgetError, match=f"{tier} budget"):
                replay(graph, {tier: peak[tier] - 1})
