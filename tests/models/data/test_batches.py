"""Batches: shifted targets, padding, shuffling by seed and epoch, exact resume."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slideformer.graph.errors import ConfigError, DataError
from slideformer.kernels.reference import IGNORE_INDEX
from slideformer.models.data.batches import Batch, BatchStream, make_batch
from slideformer.models.data.dataset import TokenDataset
from slideformer.models.data.packing import Rows

PAD = 999
Records = list[list[tuple[int, bool]]]


def dataset_of(rows: Records, seq_len: int = 6) -> TokenDataset:
    flat = [token for row in rows for token in row]
    return TokenDataset.from_arrays(
        np.array([token for token, _ in flat], dtype=np.int32),
        np.cumsum([0, *map(len, rows)]),
        np.array([learnt for _, learnt in flat], dtype=np.bool_),
        seq_len=seq_len,
        pad_id=PAD,
    )


def numbered(count: int) -> TokenDataset:
    """``count`` rows of two tokens, each made of its own number."""
    return dataset_of([[(row, True), (row, True)] for row in range(count)])


def same(left: Batch, right: Batch) -> bool:
    return torch.equal(left.input_ids, right.input_ids) and torch.equal(left.targets, right.targets)


def rows_in(batch: Batch) -> list[int]:
    return batch.input_ids[: batch.rows, 0].tolist()


def test_targets_are_shifted_and_padding_is_ignored() -> None:
    dataset = dataset_of(
        [
            [(1, True), (2, True), (3, False), (4, True)],
            [],
            [(5, True)],
            [(n, True) for n in range(10, 16)],
        ]
    )
    batch = make_batch(dataset, Rows(np.array([3, 0, 1, 2]), np.arange(5)), 5, packed=False)
    ignored = IGNORE_INDEX
    assert batch.input_ids.tolist() == [
        [10, 11, 12, 13, 14, 15],
        [1, 2, 3, 4, PAD, PAD],
        [PAD] * 6,
        [5, PAD, PAD, PAD, PAD, PAD],
        [PAD] * 6,
    ]
    assert batch.targets.tolist() == [
        [11, 12, 13, 14, 15, ignored],
        [2, ignored, 4, ignored, ignored, ignored],
        *[[ignored] * 6] * 3,
    ]
    assert batch.input_ids.dtype == batch.targets.dtype == torch.int64
    assert (batch.real_tokens, batch.target_tokens, batch.rows) == (11, 7, 4)
    with pytest.raises(FrozenInstanceError):
        batch.rows = 1  # type: ignore[misc]


@given(
    rows=st.lists(
        st.lists(st.tuples(st.integers(0, 99), st.booleans()), max_size=6), min_size=1, max_size=9
    ),
    batch_size=st.integers(1, 5),
    seed=st.integers(0, 2**40),
)
def test_an_epoch_shows_every_row_once(rows: Records, batch_size: int, seed: int) -> None:
    dataset = dataset_of(rows)
    shown = []
    for batch in BatchStream(dataset, batch_size, seed, epochs=1):
        assert batch.input_ids.shape == batch.targets.shape == (batch_size, 6)
        assert batch.target_tokens == int((batch.targets != IGNORE_INDEX).sum())
        assert (batch.input_ids[batch.rows :] == PAD).all()
        assert (batch.targets[batch.rows :] == IGNORE_INDEX).all()
        shown += list(
            zip(batch.input_ids.tolist(), batch.targets.tolist(), strict=True)
        )[: batch.rows]  # fmt: skip
    expected = []
    for row in rows:
        ids = [token for token, _ in row] + [PAD] * (6 - len(row))
        targets = [token if learnt else IGNORE_INDEX for token, learnt in row[1:]]
        expected.append((ids, targets + [IGNORE_INDEX] * (6 - len(targets))))
    assert sorted(shown) == sorted(expected)
    assert dataset.target_tokens == sum(t != IGNORE_INDEX for _, row in shown for t in row)


def test_counts_of_steps_and_the_end() -> None:
    stream = BatchStream(numbered(7), 3, seed=0, epochs=2)
    assert (stream.steps_per_epoch, stream.steps) == (3, 6)
    assert [batch.rows for batch in stream] == [3, 3, 1, 3, 3, 1]
    with pytest.raises(StopIteration):
        next(stream)
    assert BatchStream(numbered(7), 3, seed=0).steps is None


def test_order_depends_on_seed_and_epoch_alone() -> None:
    def order(seed: int) -> list[int]:
        stream = BatchStream(numbered(50), 10, seed, epochs=2)
        return [row for batch in stream for row in rows_in(batch)]

    assert order(3) == order(3)
    first, second = order(3)[:50], order(3)[50:]
    assert first != second
    assert first != list(range(50))
    assert first != order(4)[:50]
    assert sorted(first) == sorted(second) == list(range(50))


def test_order_is_the_same_for_ever() -> None:
    # Another order would break the resume of runs that exist.
    stream = BatchStream(numbered(8), 8, seed=1234)
    assert rows_in(stream.batch(0)) == [5, 6, 3, 7, 4, 1, 2, 0]
    assert rows_in(stream.batch(1)) == [2, 0, 7, 6, 1, 4, 5, 3]


def test_batch_of_a_step_is_a_pure_function() -> None:
    stream = BatchStream(numbered(11), 4, seed=5)
    drawn = [next(stream) for _ in range(9)]
    other = BatchStream(numbered(11), 4, seed=5)
    for step in (8, 0, 3, 2, 5, 8):
        assert same(other.batch(step), drawn[step])
    assert same(next(other), drawn[0])  # the position did not move


@given(
    count=st.integers(1, 12), size=st.integers(1, 5), before=st.integers(0, 20), seed=st.integers(0)
)
def test_resume_continues_exactly(count: int, size: int, before: int, seed: int) -> None:
    stream = BatchStream(numbered(count), size, seed)
    for _ in range(before):
        next(stream)
    state = json.loads(json.dumps(stream.state_dict()))
    resumed = BatchStream(numbered(count), size, seed)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    for _ in range(5):
        assert same(next(resumed), next(stream))


def test_state_names_epoch_and_index() -> None:
    stream = BatchStream(numbered(7), 3, seed=0, epochs=2)
    for _ in range(4):
        next(stream)
    state = stream.state_dict()
    assert (state["epoch"], state["index"]) == (1, 1)
    ahead = stream.state_dict(step=3)
    assert (ahead["epoch"], ahead["index"]) == (1, 0)
    stream.load_state_dict(ahead)
    assert len(list(stream)) == 3


def test_drawing_ahead_in_a_thread_changes_nothing() -> None:
    expected = list(BatchStream(numbered(23), 4, seed=9, epochs=3))
    stream = BatchStream(numbered(23), 4, seed=9, epochs=3)
    drawn = []
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(next, stream, None)
        while (batch := ahead.result()) is not None:
            ahead = pool.submit(next, stream, None)
            drawn.append(batch)
    assert len(drawn) == len(expected)
    assert all(map(same, drawn, expected))


@pytest.mark.parametrize(
    ("name", "stream"),
    [
        ("rows", BatchStream(numbered(8), 3, seed=0)),
        ("batch_size", BatchStream(numbered(7), 4, seed=0)),
        ("seed", BatchStream(numbered(7), 3, seed=1)),
        ("tokens", BatchStream(dataset_of([[(0, True)] * 3] + [[(0, True)] * 2] * 6), 3, seed=0)),
        ("seq_len", BatchStream(dataset_of([[(0, True)] * 2] * 7, seq_len=7), 3, seed=0)),
    ],
)
def test_resume_with_something_else_is_refused(name: str, stream: BatchStream) -> None:
    state = BatchStream(numbered(7), 3, seed=0).state_dict()
    with pytest.raises(DataError, match=f"the saved run had {name} .*this one has"):
        stream.load_state_dict(state)


def test_senseless_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="batch size of 0"):
        BatchStream(numbered(1), 0, seed=0)
    with pytest.raises(ConfigError, match="seed -1 is negative"):
        BatchStream(numbered(1), 1, seed=-1)
    with pytest.raises(ConfigError, match="0 epochs"):
        BatchStream(numbered(1), 1, seed=0, epochs=0)
    with pytest.raises(DataError, match="holds no rows"):
        BatchStream(numbered(0), 1, seed=0)
