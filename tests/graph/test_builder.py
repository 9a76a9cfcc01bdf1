"""Writing a graph down."""

from __future__ import annotations

import doctest

import pytest

from slideformer.graph import builder as module
from slideformer.graph.buffers import Tier
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


def test_a_build_verifies() -> None:
    builder = GraphBuilder()
    builder.task("a.x", TaskKind.CPU, reads=["gone"])
    with pytest.raises(GraphError, match="gone"):
        builder.build()
