"""Graphs for other programs and for reading: DOT, GraphML and plain text. Written, never read.
Loads networkx when it is first needed.

The form that reads back is JSON, in ``serialise.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from slideformer.graph.graph import TaskGraph
from slideformer.graph.tasks import Lane

if TYPE_CHECKING:
    import networkx as nx

COLOURS = {
    Lane.COMPUTE: "#4c78a8",
    Lane.H2D: "#f58518",
    Lane.D2H: "#e45756",
    Lane.CPU: "#54a24b",
    Lane.NVME_READ: "#b279a2",
    Lane.NVME_WRITE: "#9d755d",
}
"""Colour of each lane wherever a graph is drawn."""


def to_networkx(graph: TaskGraph) -> nx.DiGraph[str]:
    """Tasks as nodes (attributes kind, lane, op), dependencies as edges."""
    import networkx as nx

    result: nx.DiGraph[str] = nx.DiGraph(name=graph.name)
    for task in graph.tasks:
        result.add_node(task.name, kind=str(task.kind), lane=str(task.lane), op=task.op)
    for position, successors in enumerate(graph.edges.successors):
        for successor in successors:
            result.add_edge(graph.tasks[position].name, graph.tasks[successor].name)
    return result


def to_dot(graph: TaskGraph) -> str:
    """Graphviz source: a node per task, coloured by lane, an edge per dependency."""
    lines = [
        f"digraph {_quoted(graph.name)} {{",
        '  node [shape=box, style=filled, fontcolor=white, fontname="sans-serif"];',
    ]
    for task in graph.tasks:
        tip = _quoted(f"{task.kind} {task.op}")
        lines.append(f'  {_quoted(task.name)} [fillcolor="{COLOURS[task.lane]}", tooltip={tip}];')
    for position, successors in enumerate(graph.edges.successors):
        name = _quoted(graph.tasks[position].name)
        lines += [f"  {name} -> {_quoted(graph.tasks[s].name)};" for s in successors]
    return "\n".join([*lines, "}", ""])


def to_graphml(graph: TaskGraph) -> str:
    """GraphML with the attributes of `to_networkx`; ``networkx.read_graphml`` opens it."""
    import networkx as nx

    lines: list[str] = list(nx.generate_graphml(to_networkx(graph)))
    return "\n".join([*lines, ""])


def to_text(graph: TaskGraph) -> str:
    """One paragraph a task in program order: what it waits for, reads and writes."""
    lines = [
        f"graph {graph.name}: {len(graph.tasks)} tasks, {len(graph.buffers)} buffers, "
        f"{len(graph.slots)} slots"
    ]
    for position, task in enumerate(graph.tasks):
        lines.append(f"{position:6} {task.name}  {task.kind} on {task.lane}, op {task.op}")
        waits = [graph.tasks[p].name for p in graph.edges.predecessors[position]]
        for label, names in (("waits", waits), ("reads", task.reads), ("writes", task.writes)):
            if names:
                lines.append(f"         {label:6} {' '.join(names)}")
    return "\n".join([*lines, ""])


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
