"""Order, critical path and due times of a graph."""

from __future__ import annotations

from itertools import pairwise

import networkx as nx
import pytest
from hypothesis import given

from slideformer.graph.analysis import (
    critical_path,
    due_times,
    tails,
    topological_order,
)
from slideformer.graph.builder import GraphBuilder
from slideformer.graph.exchange import to_networkx
from slideformer.graph.graph import TaskGraph
from slideformer.graph.profile import MachineProfile
from slideformer.graph.tasks import Cost, TaskKind
from tests.support.graphs import step_like, task_graphs

PROFILE = MachineProfile()


@given(task_graphs())
def test_an_order_respects_every_edge(graph: TaskGraph) -> None:
    order = topological_order(graph)
    assert sorted(order) == list(range(len(graph.tasks)))
    place = {position: i for i, position in enumerate(order)}
    for position, preds in enumerate(graph.edges.predecessors):
        assert all(place[before] < place[position] for before in preds)


@given(task_graphs())
def test_the_critical_path_is_the_longest(graph: TaskGraph) -> None:
    seconds = {task.name: PROFILE.seconds(task) for task in graph.tasks}
    network = to_networkx(graph)
    for before, after in network.edges:
        network.edges[before, after]["seconds"] = seconds[before]
    longest = 0.0
    for name in network:  # the longest way there, and the task itself
        ways = nx.DiGraph(network.subgraph({name} | nx.ancestors(network, name)))
        there = nx.dag_longest_path_length(ways, weight="seconds")
        longest = max(longest, there + seconds[name])
    path = critical_path(graph, PROFILE)
    assert sum(seconds[name] for name in path) == pytest.approx(longest)
    assert all(network.has_edge(*pair) for pair in pairwise(path))
    assert max(tails(graph, PROFILE), default=0.0) == pytest.approx(longest)


@given(task_graphs())
def test_networkx_holds_the_whole_graph(graph: TaskGraph) -> None:
    network = to_networkx(graph)
    assert list(network) == [task.name for task in graph.tasks]
    for task in graph.tasks:
        expected = {"kind": str(task.kind), "lane": str(task.lane), "op": task.op}
        assert network.nodes[task.name] == expected
    assert network.number_of_edges() == sum(map(len, graph.edges.predecessors))


def test_due_times_of_a_step() -> None:
    graph = step_like(3)
    due = {task.name: 6 * t for task, t in zip(graph.tasks, due_times(graph, PROFILE), strict=True)}
    # Compute: one after another, a step of six seconds.
    for second, name in enumerate(["fwd.L0", "fwd.L1", "fwd.L2", "bwd.L2", "bwd.L1", "bwd.L0"]):
        assert due[name] == pytest.approx(second)
    # A copy up is due one second before its forward.
    assert [due[f"h2d.L{i}"] for i in range(3)] == pytest.approx([-1, 0, 1])
    # An update is due one second before its copy up in the next step, and so is the copy down.
    assert [due[f"update.L{i}"] for i in range(3)] == pytest.approx([4, 5, 6])
    assert [due[f"d2h.L{i}"] for i in range(3)] == pytest.approx([3, 4, 5])


def test_what_nothing_waits_for_is_due_at_the_end_of_the_next_step() -> None:
    builder = GraphBuilder()
    builder.task("fwd.x", TaskKind.COMPUTE, cost=Cost(seconds=1.0))
    builder.task("log.x", TaskKind.CPU, cost=Cost(seconds=1.0))
    assert due_times(builder.build(), PROFILE) == pytest.approx([0.0, 1.0])
