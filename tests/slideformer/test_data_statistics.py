"""Figures of a data set: lengths before they are cut, and what padding costs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slideformer.data_statistics import statistics_of
from slideformer.models.data.batches import BatchStream
from slideformer.models.data.dataset import TokenDataset


def dataset_of(lengths: list[int], seq_len: int) -> TokenDataset:
    return TokenDataset.from_arrays(
        np.ones(sum(lengths), dtype=np.int32),
        np.cumsum([0, *lengths]),
        np.ones(sum(lengths), dtype=np.bool_),
        seq_len=seq_len,
    )


def test_figures_of_a_mix() -> None:
    found = statistics_of(dataset_of([2, 3, 5, 8, 10, 20], 10))
    assert (found.documents, found.tokens, found.target_tokens) == (6, 38, 32)
    assert (found.truncated_documents, found.truncated_tokens) == (1, 10)
    assert found.lengths[0] == 2
    assert found.lengths[2] in (5, 8)
    assert found.lengths[-1] == 20
    assert found.mean_length == 8
    assert (found.padded_rows, found.packed_rows) == (6, 4)
    assert found.padding_share == pytest.approx(22 / 60)
    assert found.packed_padding_share == pytest.approx(2 / 40)


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=40),
    seq_len=st.integers(2, 20),
    batch_size=st.integers(1, 4),
    packing=st.booleans(),
)
def test_padding_is_what_the_batches_hold(
    lengths: list[int], seq_len: int, batch_size: int, packing: bool
) -> None:
    dataset = dataset_of(lengths, seq_len)
    stream = BatchStream(dataset, batch_size, seed=0, epochs=1, packing=packing)
    batches = list(stream)
    real, places = sum(b.real_tokens for b in batches), sum(b.input_ids.numel() for b in batches)
    assert stream.padding_share == pytest.approx(1 - real / places)
    found = statistics_of(dataset)
    rows = found.packed_rows if packing else found.padded_rows
    assert rows == sum(b.rows for b in batches)
    assert 0 <= found.packed_padding_share <= found.padding_share
