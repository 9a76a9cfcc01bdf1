"""Derived edges against the definition: tasks that touch a common byte keep their order."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slideformer.graph.analysis import next_instance_edges
from slideformer.graph.buffers import Tier
from slideformer.graph.builder import GraphBuilder
from slideformer.graph.errors import GraphError
from slideformer.graph.graph import Exit, TaskGraph
from slideformer.graph.tasks import Task, TaskKind
from tests.support.graphs import accesses, closure, conflicts, task_graphs


def own_edges(graph: TaskGraph, first: int = 0) -> set[tuple[int, int]]:
    """Predecessor pairs of a graph whose first task has the number ``first``."""
    return {
        (first + before, first + position)
        for position, preds in enumerate(graph.edges.predecessors)
        for before in preds
    }


@given(task_graphs())
def test_edges_order_exactly_what_conflicts(graph: TaskGraph) -> None:
    size = len(graph.tasks)
    pairs = own_edges(graph)
    assert pairs <= conflicts([graph]), "no edge without a reason"
    assert closure(pairs, size) == closure(conflicts([graph]), size)


@given(task_graphs())
def test_successors_mirror_predecessors(graph: TaskGraph) -> None:
    forward = {
        (before, after)
        for before, successors in enumerate(graph.edges.successors)
        for after in successors
    }
    assert forward == own_edges(graph)
    assert all(len(set(s)) == len(s) for s in graph.edges.successors)


@given(task_graphs())
def test_direct_edges_order_the_same_tasks_and_none_is_implied_by_two_others(
    graph: TaskGraph,
) -> None:
    direct, size = graph.direct, len(graph.tasks)
    pairs = {(pred, task) for pred, each in enumerate(direct.successors) for task in each}
    assert direct.predecessors == tuple(sum(after == t for _, after in pairs) for t in range(size))
    assert pairs <= own_edges(graph)
    assert closure(pairs, size) == closure(own_edges(graph), size)
    implied = {(a, c) for a, b in pairs for other, c in pairs if other == b}
    assert not pairs & implied


@given(task_graphs())
def test_entries_and_exits_byte_by_byte(graph: TaskGraph) -> None:
    entries: set[tuple[int, str, int, bool]] = set()
    writer: dict[tuple[str, int], int] = {}
    readers: dict[tuple[str, int], list[int]] = {}
    for position, task in enumerate(graph.tasks):
        read, written = accesses(graph, task)
        entries |= {(position, *x, False) for x in read if x not in writer}
        for x in read:
            readers.setdefault(x, []).append(position)
        entries |= {(position, *x, True) for x in written if x not in writer}
        for x in written:
            writer[x], readers[x] = position, []
    found = {
        (e.task, e.place, x, e.write) for e in graph.edges.entries for x in range(e.start, e.stop)
    }
    assert found == entries
    left: dict[tuple[str, int], Exit] = {}
    for leave in graph.edges.exits:
        for x in range(leave.start, leave.stop):
            assert (leave.place, x) not in left
            left[leave.place, x] = leave
    assert left.keys() == readers.keys()
    for x, leave in left.items():
        assert leave.writer == writer.get(x)
        assert list(leave.readers) == sorted(readers[x])


@given(task_graphs(), st.integers(2, 3))
def test_instances_are_ordered_like_one_long_program(graph: TaskGraph, count: int) -> None:
    size = len(graph.tasks)
    pairs = {p for i in range(count) for p in own_edges(graph, i * size)}
    for before, after in next_instance_edges(graph):
        pairs |= {(before + i * size, after + (i + 1) * size) for i in range(count - 1)}
    programs = [graph] * count
    assert closure(pairs, count * size) == closure(conflicts(programs), count * size)


def test_an_unknown_buffer_or_task_is_named() -> None:
    lost = TaskGraph("g", (Task("a.b", TaskKind.CPU, "a", reads=("nowhere",)),), {}, {})
    with pytest.raises(GraphError, match=r"task a\.b uses unknown buffer 'nowhere'"):
        _ = lost.edges
    late = TaskGraph("g", (Task("a.b", TaskKind.CPU, "a", after=("c.d",)),), {}, {})
    with pytest.raises(GraphError, match=r"task a\.b runs after unknown task 'c\.d'"):
        _ = late.edges


def test_slot_reuse_is_an_edge() -> None:
    builder = GraphBuilder()
    builder.slot("s", Tier.GPU, 8)
    first = builder.buffer("first", 8, Tier.GPU, slot="s")
    second = builder.buffer("second", 4, Tier.GPU, slot="s", offset=4)
    builder.task("write.first", TaskKind.COMPUTE, writes=[first])
    builder.task("use.first", TaskKind.COMPUTE, reads=[first])
    builder.task("write.second", TaskKind.COMPUTE, writes=[second])
    edges = builder.build().edges
    assert edges.predecessors == ((), (0,), (0, 1))
