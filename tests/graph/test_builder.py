"""Writing a graph down."""

from __future__ import annotations

import doctest
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slideformer.graph import builder as module
from slideformer.graph.buffers import Role, Tier
from slideformer.graph.builder import GraphBuilder
from slideformer.graph.errors import GraphError
from slideformer.graph.tasks import Cost, TaskKind


def test_the_example_in_the_docstring() -> None:
    results = doctest.testmod(module)
    assert results.attempted
    assert not results.failed


@pytest.mark.parametrize("what", ["task", "buffer", "slot"])
def test_a_name_is_declared_once(what: str) -> None:
    builder = GraphBuilder()

    def declare() -> None:
        if what == "task":
            builder.task("a.x", TaskKind.CPU)
        elif what == "buffer":
            builder.buffer("a.x", 4, Tier.CPU)
        else:
            builder.slot("a.x", Tier.CPU, 4)

    declare()
    with pytest.raises(GraphError, match=rf"{what} 'a\.x' is declared twice"):
        declare()


def test_tasks_keep_program_order_and_their_settings() -> None:
    builder = GraphBuilder("named")
    x = builder.buffer("x", 4, Tier.CPU, carried=True)
    builder.task("later.x", TaskKind.CPU, reads=[x])
    builder.task("a.x", TaskKind.CPU, op="other", after=["later.x"], cost=Cost(flops=3), unit="L00")
    graph = builder.build()
    assert graph.name == "named"
    assert list(graph.index) == ["later.x", "a.x"]
    first, second = graph.tasks
    assert (first.op, first.reads, first.args) == ("later", ("x",), {})
    assert (second.op, second.cost.flops, second.args) == ("other", 3, {"unit": "L00"})
    assert graph.edges.predecessors == ((), (0,))


@given(st.integers(0, 10_000), st.integers(256, 3000), st.sampled_from(["", "s"]))
def test_chunks_are_nearly_equal_and_cover_all(nbytes: int, most: int, slot: str) -> None:
    builder = GraphBuilder()
    if slot:
        builder.slot(slot, Tier.GPU, 20_000)
    names = builder.chunks("w", nbytes, most, Tier.GPU, slot=slot, offset=512 * bool(slot))
    assert names == [f"w.c{i}" for i in range(len(names))]
    buffers = [builder.build().buffers[name] for name in names]
    assert sum(b.nbytes for b in buffers) == nbytes
    assert len(buffers) == max(1, -(-nbytes // (most - most % 256)))
    assert all(b.nbytes <= most for b in buffers)
    assert all(b.nbytes == buffers[0].nbytes for b in buffers[:-1])
    if slot:
        assert [b.offset for b in buffers] == [
            512 + i * buffers[0].nbytes for i in range(len(names))
        ]
        assert all(b.offset % 256 == 0 for b in buffers)


def test_chunks_that_are_too_small_are_refused() -> None:
    with pytest.raises(GraphError, match="chunks of w are of at most 100 bytes; give 256 or more"):
        GraphBuilder().chunks("w", 1000, 100, Tier.CPU)


def test_a_build_verifies() -> None:
    builder = GraphBuilder()
    builder.task("a.x", TaskKind.CPU, reads=["gone"])
    with pytest.raises(GraphError, match="gone"):
        builder.build()


def test_names_of_tiers_kinds_and_roles_are_taken_as_these() -> None:
    builder = GraphBuilder()
    builder.slot("s", "cpu", 8)  # type: ignore[arg-type]
    builder.buffer("x", 4, "cpu", role="weight", slot="s", carried=True)  # type: ignore[arg-type]
    builder.task("a.x", "CPU", reads=["x"])  # type: ignore[arg-type]
    graph = builder.build()
    assert graph.slots["s"].tier is graph.buffers["x"].tier is Tier.CPU
    assert graph.buffers["x"].role is Role.WEIGHT
    assert graph.tasks[0].kind is TaskKind.CPU


def test_unknown_tiers_kinds_and_roles_are_refused_by_name() -> None:
    builder = GraphBuilder()
    for declare, message in (
        (lambda: builder.slot("s", "ram", 4), "slot s: Tier 'ram' does not exist; known: gpu, "),
        (lambda: builder.buffer("x", 4, Tier.CPU, role="y"), "buffer x: Role 'y' does not exist"),
        (lambda: builder.task("a.x", "GPU"), "task a.x: TaskKind 'GPU' does not .* H2D, D2H"),
    ):
        with pytest.raises(GraphError, match=message):
            declare()


@pytest.mark.parametrize("what", ["reads", "writes", "after"])
def test_a_name_in_place_of_a_list_of_names_is_refused(what: Any) -> None:
    with pytest.raises(GraphError, match=f"task a.x: {what} is the text 'x', not a list of names"):
        GraphBuilder().task("a.x", TaskKind.CPU, **{what: "x"})
