"""`HazardMap` against a model that keeps the history of every single byte."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from slideformer.graph.hazards import HazardMap, read_segment, write_segment


@dataclass
class Byte:
    """One byte's history."""

    writer: int | None = None
    readers: list[int] = field(default_factory=list)
    owner: str | None = None


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[str, int, int, bool]]:
    """Accesses (place, start, stop, write) in order."""
    steps = []
    for _ in range(draw(st.integers(1, 25))):
        start = draw(st.integers(0, 11))
        stop = draw(st.integers(start + 1, 12))
        steps.append((draw(st.sampled_from("pq")), start, stop, draw(st.booleans())))
    return steps


@given(histories())
def test_it_remembers_what_every_byte_remembers(steps: list[tuple[str, int, int, bool]]) -> None:
    hazards: HazardMap[int] = HazardMap()
    model: dict[tuple[str, int], Byte] = {}
    for task, (place, start, stop, write) in enumerate(steps):
        segments = hazards.cut(place, start, stop)
        covered = [x for s in segments for x in range(s.start, s.stop)]
        assert covered == list(range(start, stop)), "the segments tile the range in order"
        waits: set[int] = set()
        expected: set[int] = set()
        for segment in segments:
            if write:
                waits.update(write_segment(segment, task, f"owner{task}"))
            else:
                waits.update(read_segment(segment, task))
        for position in range(start, stop):
            byte = model.setdefault((place, position), Byte())
            expected.update([] if byte.writer is None else [byte.writer])
            if write:
                expected.update(byte.readers)
                model[place, position] = Byte(task, [], f"owner{task}")
            else:
                byte.readers.append(task)
        assert waits == expected
    found = {}
    for place, segment in hazards.segments():
        for position in range(segment.start, segment.stop):
            assert (place, position) not in found, "segments never overlap"
            found[place, position] = Byte(segment.writer, segment.readers, segment.owner)
    assert found == model


def test_a_task_does_not_wait_for_itself_to_read_what_it_overwrites() -> None:
    hazards: HazardMap[int] = HazardMap()
    (segment,) = hazards.cut("p", 0, 4)
    assert read_segment(segment, 7) == []
    assert write_segment(segment, 7, "b") == []


def test_parts_of_a_segment_have_histories_of_their_own() -> None:
    hazards: HazardMap[int] = HazardMap()
    (whole,) = hazards.cut("p", 0, 8)
    write_segment(whole, 1, "b")
    read_segment(hazards.cut("p", 0, 4)[0], 2)
    assert hazards.cut("p", 0, 4)[0].readers == [2]
    assert hazards.cut("p", 4, 8)[0].readers == []
