"""Differences of two graphs: nothing for equal ones, one entry for each change."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given

from slideformer.graph.buffers import Buffer, Tier
from slideformer.graph.diff import Difference, diff
from slideformer.graph.graph import TaskGraph
from slideformer.graph.step import compile_step
from slideformer.graph.tasks import Cost, Task, TaskKind
from tests.support.graphs import task_graphs
from tests.support.specs import small_plan, small_spec

X, Y = (Buffer(name, 4, Tier.CPU) for name in "xy")
A, B, C = (Task(f"{name}.x", TaskKind.CPU, "op", ("x",), ("y",)) for name in "abc")


def graph_of(*tasks: Task, buffers: tuple[Buffer, ...] = (X, Y)) -> TaskGraph:
    """A graph of these tasks."""
    return TaskGraph("g", tasks, {b.name: b for b in buffers}, {})


@given(task_graphs(), task_graphs())
def test_only_equal_graphs_have_no_difference(one: TaskGraph, two: TaskGraph) -> None:
    assert diff(one, one) == []
    assert (diff(one, two) == []) == (replace(one, name=two.name) == two)


@pytest.mark.parametrize(
    ("new", "expected"),
    [
        (graph_of(A, B, C), ["added task c.x"]),
        (graph_of(A), ["removed task b.x"]),
        (graph_of(B, A), ["moved task b.x: now first", "moved task a.x: now behind b.x"]),
        (graph_of(C, A, B), ["added task c.x"]),
        (graph_of(A, replace(B, reads=("y",))), ["changed task b.x: reads -x +y"]),
        (graph_of(A, replace(B, op="mul")), ["changed task b.x: op op → mul"]),
        (graph_of(A, B, buffers=(X, replace(Y, nbytes=8))), ["changed buffer y: nbytes 4 → 8"]),
        (graph_of(A, B, buffers=(X,)), ["removed buffer y"]),
    ],
)
def test_a_change_is_named(new: TaskGraph, expected: list[str]) -> None:
    assert [str(d) for d in diff(graph_of(A, B), new)] == expected


def test_a_changed_cost_is_told() -> None:
    [found] = diff(graph_of(A), graph_of(replace(A, cost=Cost(flops=7))))
    assert found.name == "a.x"
    assert "flops=7" in found.details


def test_two_plans_of_one_model() -> None:
    spec = small_spec()
    old, new = (compile_step(spec, small_plan(window=window)) for window in (2, 3))
    found = diff(old, new)
    assert Difference("added", "slot", "w.2") in found
    assert {d.what for d in found} == {"slot", "buffer", "task"}
    assert not [d for d in found if d.name.startswith("update.")]
