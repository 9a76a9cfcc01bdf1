"""Task names print and parse; each kind has its lane."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slideformer.graph.errors import GraphError
from slideformer.graph.tasks import LANE_OF, Lane, Task, TaskKind, TaskName

parts = st.text("abzAZ09_-", min_size=1, max_size=5)


@given(st.builds(TaskName, parts, parts, st.lists(parts, max_size=3).map(tuple)))
def test_a_name_round_trips(name: TaskName) -> None:
    assert TaskName.parse(str(name)) == name


@given(st.lists(parts, min_size=2, max_size=5).map(".".join))
def test_a_text_round_trips(text: str) -> None:
    assert str(TaskName.parse(text)) == text


def test_the_parts_of_a_name() -> None:
    assert TaskName.parse("h2d.L07.fwd.c1") == TaskName("h2d", "L07", ("fwd", "c1"))


@pytest.mark.parametrize(
    "text", ["", "fwd", ".", "fwd.", ".L07", "fwd..m0", "fwd.L 7", "fwd.L07\n", "fwd.L07.ä"]
)
def test_a_malformed_name_is_refused(text: str) -> None:
    with pytest.raises(GraphError, match="malformed"):
        TaskName.parse(text)


@pytest.mark.parametrize(
    ("kind", "lane"),
    [
        (TaskKind.COMPUTE, Lane.COMPUTE),
        (TaskKind.H2D, Lane.H2D),
        (TaskKind.D2H, Lane.D2H),
        (TaskKind.CPU, Lane.CPU),
        (TaskKind.CPU_UPDATE, Lane.CPU),
        (TaskKind.NVME_READ, Lane.NVME_READ),
        (TaskKind.NVME_WRITE, Lane.NVME_WRITE),
        (TaskKind.SAVE, Lane.NVME_WRITE),
    ],
)
def test_the_kind_decides_the_lane(kind: TaskKind, lane: Lane) -> None:
    assert Task("a.b", kind, "a").lane is lane


def test_every_kind_has_a_lane() -> None:
    assert LANE_OF.keys() == set(TaskKind)
