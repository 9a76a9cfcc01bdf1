"""Chunks tile their units."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slideformer.graph.chunks import chunk_unit, vocab_chunks
from slideformer.graph.model import ALIGNMENT, ModelSpec, UnitKind
from tests.support.specs import small_spec, specs


@given(specs(), st.integers(1, 5000), st.integers(1, 6))
def test_chunks_tile_every_unit(spec: ModelSpec, chunk_numel: int, vocab: int) -> None:
    for unit in spec.units:
        chunks = chunk_unit(spec, unit, chunk_numel, vocab)
        position = 0
        for number, chunk in enumerate(chunks):
            assert chunk.unit == unit.name
            assert chunk.index == number
            assert chunk.label == f"c{number}"
            assert chunk.begin == position, "no gap and no overlap"
            assert chunk.numel > 0
            position = chunk.end
        assert position == unit.numel


@given(specs(), st.integers(1, 5000), st.integers(1, 6))
def test_chunks_are_as_small_as_asked_for(spec: ModelSpec, chunk_numel: int, vocab: int) -> None:
    for unit in spec.units:
        rows = unit.kind in (UnitKind.EMBED, UnitKind.HEAD)
        least = spec.hidden if rows else ALIGNMENT
        for chunk in chunk_unit(spec, unit, chunk_numel, vocab):
            assert chunk.numel <= max(chunk_numel, least)


@given(specs(), st.integers(1, 5000), st.integers(1, 6))
def test_chunks_start_where_copies_may_start(spec: ModelSpec, chunk_numel: int, vocab: int) -> None:
    for unit in spec.units:
        rows = unit.kind in (UnitKind.EMBED, UnitKind.HEAD)
        for chunk in chunk_unit(spec, unit, chunk_numel, vocab):
            assert chunk.begin % (spec.hidden if rows else ALIGNMENT) == 0
            if rows:
                assert chunk.end % spec.hidden == 0


@given(specs(), st.integers(1, 5000), st.integers(1, 6))
def test_chunks_of_the_output_matrix_lie_in_one_vocabulary_chunk(
    spec: ModelSpec, chunk_numel: int, count: int
) -> None:
    parts = vocab_chunks(spec, count)
    for chunk in chunk_unit(spec, spec.head, chunk_numel, count):
        part = parts[chunk.vocab]
        assert part.start * spec.hidden <= chunk.begin < chunk.end <= part.stop * spec.hidden
    if not spec.tied:
        whole = chunk_unit(spec, spec.embed, chunk_numel, count)
        assert {chunk.vocab for chunk in whole} == {0}, "the embedding alone is not swept"


@given(specs(), st.integers(1, 100))
def test_vocabulary_chunks_tile_the_vocabulary(spec: ModelSpec, count: int) -> None:
    parts = vocab_chunks(spec, count)
    assert 1 <= len(parts) <= count
    assert [part.index for part in parts] == list(range(len(parts)))
    assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
    assert parts[-1].stop == spec.vocab
    sizes = [part.stop - part.start for part in parts]
    assert min(sizes) > 0
    assert len(set(sizes[:-1])) <= 1
    assert sizes[-1] <= sizes[0]


@pytest.mark.parametrize(
    ("chunk_numel", "sizes"), [(10_000, [888]), (24 * 20, [456, 432]), (1, [24] * 37)]
)
def test_rows_are_cut_nearly_equally(chunk_numel: int, sizes: list[int]) -> None:
    spec = small_spec()
    chunks = chunk_unit(spec, spec.head, chunk_numel, 1)
    assert [chunk.numel for chunk in chunks] == sizes
