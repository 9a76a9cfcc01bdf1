"""Each rule of a graph, broken once; the message names the task, buffer or slot."""

from __future__ import annotations

import math
from collections.abc import Iterable

import pytest
from hypothesis import given

from slideformer.graph.buffers import Buffer, Slot, Tier
from slideformer.graph.errors import GraphError
from slideformer.graph.graph import TaskGraph
from slideformer.graph.tasks import Cost, Product, ProductKind, Task, TaskKind
from slideformer.graph.verify import verify
from tests.support.graphs import task_graphs


def graph_of(
    tasks: Iterable[Task] = (), buffers: Iterable[Buffer] = (), slots: Iterable[Slot] = ()
) -> TaskGraph:
    """A graph made by hand, unverified."""
    return TaskGraph(
        "broken", tuple(tasks), {b.name: b for b in buffers}, {s.name: s for s in slots}
    )


def cpu(name: str, cost: Cost | None = None, **lists: tuple[str, ...]) -> Task:
    """A task on the host."""
    return Task(name, TaskKind.CPU, "op", cost=cost or Cost(), **lists)


SLOT = Slot("s", Tier.CPU, 8)
LOW = Buffer("low", 6, Tier.CPU, slot="s")
HIGH = Buffer("high", 4, Tier.CPU, slot="s", offset=4)
CARRIED = Buffer("kept", 6, Tier.CPU, slot="s", carried=True)
ALSO = Buffer("also", 4, Tier.CPU, slot="s", offset=4, carried=True)
ON_GPU = Buffer("on_gpu", 4, Tier.GPU)

BROKEN: dict[str, tuple[TaskGraph, list[str]]] = {
    "malformed name": (graph_of([cpu("one")]), ["'one'", "malformed"]),
    "name twice": (graph_of([cpu("a.x"), cpu("a.x")]), ["task a.x", "2 tasks"]),
    "unknown buffer read": (graph_of([cpu("a.x", reads=("gone",))]), ["a.x", "reads 'gone'"]),
    "unknown buffer written": (graph_of([cpu("a.x", writes=("gone",))]), ["a.x", "writes 'gone'"]),
    "unknown task": (graph_of([cpu("a.x", after=("b.x",))]), ["a.x", "'b.x'"]),
    "unknown slot": (graph_of(buffers=[LOW]), ["low", "slot 's'"]),
    "slot overflow": (
        graph_of(buffers=[Buffer("wide", 5, Tier.CPU, slot="s", offset=4)], slots=[SLOT]),
        ["wide", "4–9", "s", "8"],
    ),
    "tier of slot": (
        graph_of(buffers=[Buffer("b", 4, Tier.GPU, slot="s")], slots=[SLOT]),
        ["b", "gpu", "s", "cpu"],
    ),
    "negative size": (graph_of(buffers=[Buffer("b", -1, Tier.CPU)]), ["b", "-1"]),
    "negative offset": (
        graph_of(buffers=[Buffer("b", 1, Tier.CPU, slot="s", offset=-1)], slots=[SLOT]),
        ["b", "-1"],
    ),
    "slot size": (graph_of(slots=[Slot("s", Tier.CPU, -4)]), ["s", "-4"]),
    "part of a byte": (graph_of(buffers=[Buffer("b", 4.5, Tier.CPU)]), ["b", "size is 4.5"]),  # type: ignore[arg-type]
    "size without digits": (graph_of(slots=[Slot("s", Tier.CPU, 10**5000)]), ["slot s", "<int"]),
    "negative cost": (
        graph_of([cpu("a.x", cost=Cost(nbytes=-5))]),
        ["task a.x: cost.nbytes is -5", "less than 2^63"],
    ),
    "cost that is too large": (
        graph_of([cpu("a.x", cost=Cost(flops=1 << 63))]),
        ["task a.x: cost.flops is 9223372036854775808"],
    ),
    "no duration": (
        graph_of([cpu("a.x", cost=Cost(seconds=math.nan))]),
        ["task a.x: cost.seconds is nan, not a number from 0 to 1e+20"],
    ),
    "duration that has no sum": (
        graph_of([cpu("a.x", cost=Cost(seconds=1e308))]),
        ["task a.x: cost.seconds is 1e+308"],
    ),
    "product of nothing": (
        graph_of([cpu("a.x", cost=Cost(products=(Product(ProductKind.HEAD, 1, 0, 1),)))]),
        ["task a.x: cost.products.0.tokens is 0", "from 1"],
    ),
    "slot named like a buffer": (
        graph_of(buffers=[Buffer("s", 4, Tier.CPU)], slots=[SLOT]),
        ["slot s", "same name"],
    ),
    "tier read": (
        graph_of([cpu("a.x", reads=("on_gpu",))], [ON_GPU]),
        ["a.x", "reads on_gpu in gpu", "cpu, pinned"],
    ),
    "tier written": (
        graph_of([Task("a.x", TaskKind.H2D, "op", writes=("low",))], [LOW], [SLOT]),
        ["a.x", "writes low in cpu", "gpu"],
    ),
    "read before write": (
        graph_of([cpu("a.x", reads=("low",))], [LOW], [SLOT]),
        ["a.x", "reads low before"],
    ),
    "half written": (
        graph_of([cpu("a.x", writes=("high",)), cpu("b.x", reads=("low",))], [LOW, HIGH], [SLOT]),
        ["b.x", "reads low before"],
    ),
    "stale read": (
        graph_of(
            [cpu("a.x", writes=("low",)), cpu("b.x", writes=("high",)), cpu("c.x", reads=("low",))],
            [LOW, HIGH],
            [SLOT],
        ),
        ["c.x", "reads low", "overwritten by high of task b.x"],
    ),
    "carried twice": (graph_of(buffers=[CARRIED, ALSO], slots=[SLOT]), ["kept", "also", "carried"]),
    "carried overwritten": (
        graph_of([cpu("a.x", writes=("high",))], [CARRIED, HIGH], [SLOT]),
        ["kept", "carried", "high of task a.x"],
    ),
}


@pytest.mark.parametrize("rule", BROKEN)
def test_a_broken_rule_is_named(rule: str) -> None:
    graph, words = BROKEN[rule]
    with pytest.raises(GraphError) as raised:
        verify(graph)
    message = str(raised.value)
    assert message.startswith("graph 'broken' breaks 1 rule(s):")
    assert all(word in message for word in words), message


CYCLES: dict[str, tuple[TaskGraph, list[str]]] = {
    "of three": (
        graph_of(
            [cpu("a.x", after=("c.x",)), cpu("b.x", after=("a.x",)), cpu("c.x", after=("b.x",))]
        ),
        ["a.x", "b.x", "c.x"],
    ),
    "through a buffer": (
        graph_of(
            [cpu("a.x", writes=("low",), after=("b.x",)), cpu("b.x", reads=("low",))], [LOW], [SLOT]
        ),
        ["a.x", "b.x"],
    ),
    "of one": (graph_of([cpu("a.x", after=("a.x",))]), ["a.x"]),
}


@pytest.mark.parametrize("form", CYCLES)
def test_a_cycle_is_told_in_waiting_order(form: str) -> None:
    graph, names = CYCLES[form]
    with pytest.raises(GraphError, match="wait for each other: ") as raised:
        verify(graph)
    told = str(raised.value).rpartition(": ")[2].split(" -> ")
    start = names.index(told[0])  # it may begin with any of its tasks
    assert told == [*names[start:], *names[:start], told[0]]


def test_an_empty_buffer_shares_no_bytes() -> None:
    empty = Buffer("empty", 0, Tier.CPU, slot="s", offset=2, carried=True)
    tasks = [cpu("a.x", writes=("kept",)), cpu("b.x", reads=("empty",), writes=("empty",))]
    verify(graph_of(tasks, [CARRIED, empty], [SLOT]))
    verify(graph_of(tasks, [empty, CARRIED], [SLOT]))


def test_every_broken_rule_is_listed() -> None:
    graph = graph_of([cpu("a.x", reads=("p", "q")), cpu("b.x", writes=("r",))])
    with pytest.raises(GraphError, match="breaks 3 rule") as raised:
        verify(graph)
    assert all(f"'{name}'" in str(raised.value) for name in "pqr")


def test_a_long_list_is_cut() -> None:
    graph = graph_of([cpu("a.x", reads=tuple(f"b{i}" for i in range(50)))])
    with pytest.raises(GraphError, match="and 30 more"):
        verify(graph)


@pytest.mark.parametrize("kind", TaskKind)
def test_each_kind_may_touch_the_tiers_of_its_lane_only(kind: TaskKind) -> None:
    host = {Tier.PINNED, Tier.CPU}
    every = set(Tier)
    allowed = {
        TaskKind.H2D: (host, {Tier.GPU}),
        TaskKind.D2H: ({Tier.GPU}, host),
        TaskKind.COMPUTE: ({Tier.GPU}, {Tier.GPU}),
        TaskKind.CPU_UPDATE: (host, host),
        TaskKind.CPU: (host, host),
        TaskKind.NVME_READ: ({Tier.NVME}, every - {Tier.NVME}),
        TaskKind.NVME_WRITE: (every - {Tier.NVME}, {Tier.NVME}),
        TaskKind.SAVE: (every, {Tier.NVME}),
    }[kind]
    for tier in Tier:
        buffer = Buffer("b", 4, tier, carried=True)
        for may, lists in zip(allowed, ({"reads": ("b",)}, {"writes": ("b",)}), strict=True):
            graph = graph_of([Task("a.x", kind, "op", **lists)], [buffer])
            if tier in may:
                verify(graph)
            else:
                with pytest.raises(GraphError, match=f"in {tier}"):
                    verify(graph)


@given(task_graphs())
def test_what_keeps_the_rules_passes(graph: TaskGraph) -> None:
    verify(graph)
