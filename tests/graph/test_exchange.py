"""Exports to other programs: complete, and readable where a reader is at hand."""

from __future__ import annotations

import io

import networkx as nx
from hypothesis import given

from slideformer.graph.buffers import Tier
from slideformer.graph.builder import GraphBuilder
from slideformer.graph.exchange import to_dot, to_graphml, to_text
from slideformer.graph.graph import TaskGraph
from slideformer.graph.tasks import TaskKind
from tests.support.graphs import task_graphs


def pair() -> TaskGraph:
    """Two tasks, one waiting for the other; an op that needs quoting."""
    b = GraphBuilder('say "hi"')
    b.buffer("x", 4, Tier.CPU)
    b.task("make.x", TaskKind.CPU, op='o"p\\', writes=["x"])
    b.task("use.x", TaskKind.CPU, reads=["x"])
    return b.build()


@given(task_graphs())
def test_graphml_opens_with_networkx(graph: TaskGraph) -> None:
    read = nx.read_graphml(io.BytesIO(to_graphml(graph).encode()))
    assert dict(read.nodes(data=True)) == {
        t.name: {"kind": t.kind.value, "lane": t.lane.value, "op": t.op} for t in graph.tasks
    }
    assert sorted(read.edges()) == sorted(
        (graph.tasks[p].name, task.name)
        for task, preds in zip(graph.tasks, graph.edges.predecessors, strict=True)
        for p in preds
    )


def test_dot_quotes_names_and_has_every_edge() -> None:
    lines = to_dot(pair()).splitlines()
    assert lines[0] == r'digraph "say \"hi\"" {'
    assert any(line.startswith('  "make.x" [') and r'"CPU o\"p\\"' in line for line in lines)
    assert [line for line in lines if "->" in line] == ['  "make.x" -> "use.x";']


def test_text_tells_what_each_task_waits_for_reads_and_writes() -> None:
    assert to_text(pair()).splitlines() == [
        'graph say "hi": 2 tasks, 1 buffers, 0 slots',
        '     0 make.x  CPU on cpu, op o"p\\',
        "         writes x",
        "     1 use.x  CPU on cpu, op use",
        "         waits  make.x",
        "         reads  x",
    ]
