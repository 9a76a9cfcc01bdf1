"""Packing: every document once, whole, in rows with little padding."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slideformer.kernels.reference import IGNORE_INDEX
from slideformer.models.data.batches import BatchStream, make_batch
from slideformer.models.data.dataset import TokenDataset
from slideformer.models.data.packing import Rows, one_each, pack


@given(lengths=st.lists(st.integers(0, 12), max_size=40), capacity=st.integers(12, 30))
def test_every_document_is_in_one_row_and_every_row_fits(lengths: list[int], capacity: int) -> None:
    rows = pack(np.array(lengths, dtype=np.int64), capacity)
    assert sorted(rows.documents) == [i for i, length in enumerate(lengths) if length]
    filled = [
        sum(lengths[document] for document in rows.documents[a:b]) for a, b in pairwise(rows.starts)
    ]
    assert all(0 < tokens <= capacity for tokens in filled)
    # No two rows would fit into one.
    smallest = sorted(filled)[:2]
    assert len(smallest) < 2 or sum(smallest) > capacity


def test_a_document_goes_where_it_leaves_least_room() -> None:
    rows = pack(np.array([3, 9, 6, 4, 1, 7], dtype=np.int64), 10)
    found = [rows.documents[a:b].tolist() for a, b in pairwise(rows.starts)]
    assert found == [[1, 4], [5, 0], [2, 3]]


def test_a_log_normal_mix_has_next_to_no_padding() -> None:
    """As measured on the mix that the benchmark uses: mean a third of the row."""
    drawn = np.random.default_rng(0).lognormal(mean=-0.5, sigma=1.0, size=4000) * 1024 / 3
    lengths = np.clip(drawn, 1, 1024).astype(np.int64)
    rows = pack(lengths, 1024)
    assert 1 - lengths.sum() / (len(rows) * 1024) < 0.002
    assert 1 - lengths.sum() / (len(lengths) * 1024) > 0.6, "unpacked it is mostly padding"


@given(data=st.data(), count=st.integers(1, 12), batch_size=st.integers(1, 4))
def test_packed_batches_hold_the_documents_targets_and_positions(
    data: st.DataObject, count: int, batch_size: int
) -> None:
    lengths = data.draw(st.lists(st.integers(0, 8), min_size=count, max_size=count))
    generator = np.random.default_rng(count)
    dataset = TokenDataset.from_arrays(
        np.arange(1, sum(lengths) + 1, dtype=np.int32),
        np.cumsum([0, *lengths]),
        generator.random(sum(lengths)) < 0.7,
        seq_len=8,
        pad_id=0,
    )
    plain = make_batch(dataset, one_each(count), count, packed=False)
    wanted = {
        tuple(ids[:length].tolist()): targets[:length].tolist()
        for ids, targets, length in zip(plain.input_ids, plain.targets, lengths, strict=True)
        if length
    }
    found = {}
    stream = BatchStream(dataset, batch_size, seed=1, epochs=1, packing=True)
    for batch in stream:
        batch.check((batch_size, 8), 100, packed=True) if batch.target_tokens else None
        assert batch.positions is not None
        for row in zip(batch.input_ids, batch.targets, batch.positions, strict=True):
            starts = [*(row[2] == 0).nonzero().view(-1).tolist(), 8]
            for a, b in pairwise(starts):
                assert row[2][a:b].tolist() == list(range(b - a))
                if row[0][a]:
                    found[tuple(row[0][a:b].tolist())] = row[1][a:b].tolist()
                else:
                    assert b == 8, "padding ends a row"
                    assert row[1][a:].eq(IGNORE_INDEX).all()
    assert found == wanted
    assert stream.steps == -(-len(pack(np.array(lengths), 8)) // batch_size)


def test_packed_streams_resume_exactly_and_refuse_the_other_packing() -> None:
    lengths = [3, 8, 2, 5, 7, 1, 4, 6, 2, 2]
    dataset = TokenDataset.from_arrays(
        np.arange(sum(lengths), dtype=np.int32),
        np.cumsum([0, *lengths]),
        np.ones(sum(lengths), dtype=np.bool_),
        seq_len=8,
    )
    whole = list(BatchStream(dataset, 2, seed=3, epochs=3, packing=True))
    for stop in range(len(whole)):
        first = BatchStream(dataset, 2, seed=3, epochs=3, packing=True)
        for _ in range(stop):
            next(first)
        second = BatchStream(dataset, 2, seed=3, epochs=3, packing=True)
        second.load_state_dict(first.state_dict())
        for expected, batch in zip(whole[stop:], second, strict=True):
            assert torch.equal(batch.input_ids, expected.input_ids)
            assert batch.positions is not None
            assert expected.positions is not None
            assert torch.equal(batch.positions, expected.positions)
    from slideformer.graph.errors import DataError

    with pytest.raises(DataError, match="packing"):
        BatchStream(dataset, 2, seed=3).load_state_dict(first.state_dict())


def test_rows_are_taken_by_number() -> None:
    rows = Rows(np.array([4, 2, 0, 1]), np.array([0, 1, 1, 4]))
    taken = rows.take(np.array([2, 0, 1]))
    assert (taken.documents.tolist(), taken.starts.tolist()) == ([2, 0, 1, 4], [0, 3, 4, 4])
