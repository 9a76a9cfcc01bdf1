"""Which embedding rows a step uses: against a dictionary of positions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slideformer.graph.errors import TaskError
from slideformer.models.context import StepResults, UsedRows, unpack_rows

VOCAB = 9
tokens = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=30)
padding = st.one_of(st.none(), st.integers(0, VOCAB - 1))


def positions(ids: list[int], padding_idx: int | None) -> dict[int, list[int]]:
    """Used row → where it is used, in order."""
    found: dict[int, list[int]] = {}
    for position, token in enumerate(ids):
        if token != padding_idx:
            found.setdefault(token, []).append(position)
    return dict(sorted(found.items()))


def as_dict(used: UsedRows) -> dict[int, list[int]]:
    """The same, from its tensors."""
    starts = used.starts.tolist()
    assert starts[0] == 0
    assert starts[-1] == len(used.order)
    return {
        row: used.order[starts[i] : starts[i + 1]].tolist()
        for i, row in enumerate(used.rows.tolist())
    }


@given(tokens, padding)
def test_rows_and_positions(ids: list[int], padding_idx: int | None) -> None:
    used = UsedRows.of(torch.tensor(ids), VOCAB, padding_idx)
    expected = positions(ids, padding_idx)
    assert as_dict(used) == expected
    assert used.rows.tolist() == list(expected)
    assert used.idle.tolist() == [row for row in range(VOCAB) if row not in expected]


@given(tokens, padding, st.integers(0, VOCAB), st.integers(0, VOCAB))
def test_rows_within_a_range(ids: list[int], padding_idx: int | None, a: int, b: int) -> None:
    start, stop = sorted((a, b))
    part = UsedRows.of(torch.tensor(ids), VOCAB, padding_idx).within(start, stop)
    expected = {
        row - start: at for row, at in positions(ids, padding_idx).items() if start <= row < stop
    }
    assert as_dict(part) == expected
    assert part.idle.tolist() == [row for row in range(stop - start) if row not in expected]


@given(tokens, padding, st.integers(0, 5))
def test_packing_loses_nothing(ids: list[int], padding_idx: int | None, spare: int) -> None:
    used = UsedRows.of(torch.tensor(ids), VOCAB, padding_idx)
    room = len(ids) + spare
    index = used.packed(room)
    assert index.shape == (3 * room + VOCAB + 3,)
    packed = unpack_rows(index, room)
    count = int(packed.used_count)
    again = UsedRows(
        packed.rows[:count],
        packed.starts[: count + 1],
        packed.order[: int(packed.starts[count])],
        packed.idle[: int(packed.idle_count)],
    )
    assert as_dict(again) == as_dict(used)
    assert again.idle.tolist() == used.idle.tolist()


def test_a_failure_reaches_results_that_are_not_there_yet() -> None:
    results = StepResults()
    results.loss.set_result(1.5)
    results.fail(TaskError("later"))
    assert results.loss.result() == 1.5
    with pytest.raises(TaskError, match="later"):
        results.gradient_norm.result()
