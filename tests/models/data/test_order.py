"""Orders: fixed by their seed for ever, fair to every row over the epochs."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from slideformer.models.data.order import epoch_rows, shuffled, split_off

SEEDS = st.integers(0, 2**63 - 1)


@given(count=st.integers(0, 50), seed=SEEDS, epoch=st.integers(0, 9))
def test_a_shuffle_is_an_order_of_all_and_its_seed_decides(
    count: int, seed: int, epoch: int
) -> None:
    order = shuffled(count, seed, epoch)
    assert sorted(order) == list(range(count))
    assert order.tolist() == shuffled(count, seed, epoch).tolist()


def test_orders_are_the_same_for_ever() -> None:
    # Others would break the resume of runs that exist.
    assert shuffled(8, 1234, 0).tolist() == [5, 6, 3, 7, 4, 1, 2, 0]
    assert split_off(8, 0.3, 1234).nonzero()[0].tolist() == [3, 5]
    assert [epoch_rows(4, 0.5, 1234, 0, epoch).tolist() for epoch in range(4)] == [
        *([0, 2], [1, 3]),
        *([0, 1], [2, 3]),
    ]


@given(
    rows=st.integers(1, 30),
    weight=st.floats(0.01, 5),
    seed=SEEDS,
    part=st.integers(0, 3),
    epochs=st.integers(1, 6),
)
def test_rows_take_turns(rows: int, weight: float, seed: int, part: int, epochs: int) -> None:
    shown: Counter[int] = Counter({row: 0 for row in range(rows)})
    count = max(1, round(weight * rows))
    for epoch in range(epochs):
        taken = epoch_rows(rows, weight, seed, part, epoch)
        assert len(taken) == count, "every epoch is as long"
        assert taken.tolist() == sorted(taken)
        shown.update(taken.tolist())
    assert set(shown) == set(range(rows))
    assert max(shown.values()) - min(shown.values()) <= 1


def test_a_weight_of_one_shows_every_row_once() -> None:
    assert epoch_rows(9, 1.0, 3, 0, 7).tolist() == list(range(9))
    assert epoch_rows(9, 3.0, 3, 0, 7).tolist() == [row for row in range(9) for _ in range(3)]
    assert epoch_rows(0, 1.0, 3, 0, 7).tolist() == []


@given(count=st.integers(1, 400), share=st.floats(0.001, 0.999), seed=SEEDS)
def test_a_split_is_of_the_share_asked_for(count: int, share: float, seed: int) -> None:
    aside = split_off(count, share, seed)
    assert len(aside) == count
    assert np.count_nonzero(aside) == max(1, round(share * count))


def test_sources_and_epochs_have_orders_of_their_own() -> None:
    half = [epoch_rows(40, 0.5, 3, part, 0).tolist() for part in range(3)]
    assert len({tuple(rows) for rows in half}) == 3
    assert len({tuple(shuffled(40, 3, epoch)) for epoch in range(5)}) == 5
