"""Any valid graph with one rule broken is refused, and the message names what broke it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from slideformer.graph.buffers import Buffer, Slot, Tier
from slideformer.graph.errors import GraphError
from slideformer.graph.graph import TaskGraph
from slideformer.graph.serialise import from_json, to_json
from slideformer.graph.tasks import LANE_OF, Lane, Task, TaskKind
from slideformer.graph.verify import verify
from tests.support.graphs import task_graphs

Broken = tuple[TaskGraph, tuple[str, ...]]
"""A graph and the names that its refusal must contain."""


def with_task(graph: TaskGraph, position: int, **changes: object) -> TaskGraph:
    """The graph with fields of one task changed."""
    tasks = list(graph.tasks)
    tasks[position] = replace(tasks[position], **changes)
    return replace(graph, tasks=tuple(tasks))


def with_buffer(graph: TaskGraph, buffer: Buffer) -> TaskGraph:
    """The graph with one buffer added or replaced."""
    return replace(graph, buffers={**graph.buffers, buffer.name: buffer})


def a_task(draw: st.DrawFn, graph: TaskGraph) -> tuple[int, Task]:
    """Any task and its position."""
    assume(graph.tasks)
    position = draw(st.integers(0, len(graph.tasks) - 1))
    return position, graph.tasks[position]


def a_cycle(draw: st.DrawFn, graph: TaskGraph) -> Broken:
    """A task is made to run after one that waits for it."""
    edges = [(p, t) for t, before in enumerate(graph.edges.predecessors) for p in before]
    assume(edges)
    first, last = draw(st.sampled_from(edges))
    names = graph.tasks[first].name, graph.tasks[last].name
    return with_task(graph, first, after=(*graph.tasks[first].after, names[1])), names


def a_dangling_buffer(draw: st.DrawFn, graph: TaskGraph) -> Broken:
    """A buffer that some task uses is taken away."""
    users = [t for t in graph.tasks if t.reads or t.writes]
    assume(users)
    task = draw(st.sampled_from(users))
    name = draw(st.sampled_from([*task.reads, *task.writes]))
    left = {key: buffer for key, buffer in graph.buffers.items() if key != name}
    return replace(graph, buffers=left), (f"task {task.name}", name)


def a_dangling_task(draw: st.DrawFn, graph: TaskGraph) -> Broken:
    """A task is made to run after one that there is not."""
    position, task = a_task(draw, graph)
    return with_task(graph, position, after=("no.task",)), (f"task {task.name}", "no.task")


def a_name_twice(draw: st.DrawFn, graph: TaskGraph) -> Broken:
    """A task is listed a second time."""
    _, task = a_task(draw, graph)
    again = replace(task, reads=(), writes=(), after=())
    return replace(graph, tasks=(*graph.tasks, again)), (f"task {task.name}",)


def a_read_too_early(draw: st.DrawFn, graph: TaskGraph) -> Broken:
    """A task comes to read a buffer of its own tier that nothing has written."""
    position, task = a_task(draw, graph)
    assume(task.reads)
    tier = graph.buffers[task.reads[0]].tier
    fresh = Buffer("fresh", 1, tier)
    return (
        with_task(with_buffer(graph, fresh), position, reads=(*task.reads, "fresh")),
        (f"task {task.name}", "fresh"),
    )


def a_slot_overlap(draw: st.DrawFn, graph: TaskGraph) -> Broken:
    """A task comes to write over bytes of a carried buffer in the same slot."""
    kept, over = draw(st.permutations([(0, 4), (draw(st.integers(1, 3)), 4)]))
    graph = replace(graph, slots={**graph.slots, "shared": Slot("shared", Tier.GPU, 8)})
    for name, (offset, nbytes) in (("kept", kept), ("over", over)):
        buffer = Buffer(
            name, nbytes, Tier.GPU, slot="shared", offset=offset, carried=name == "kept"
        )
        graph = with_buffer(graph, buffer)
    writer = Task("late.x", TaskKind.COMPUTE, "mix", writes=("over",))
    at = draw(st.integers(0, len(graph.tasks)))
    broken = replace(graph, tasks=(*graph.tasks[:at], writer, *graph.tasks[at:]))
    return broken, ("buffer kept", "over of task late.x")


def an_overlap_within_a_task(draw: st.DrawFn, graph: TaskGraph) -> Broken:
    """A task comes to write a buffer that shares bytes with one that it reads or writes."""
    position, task = a_task(draw, graph)
    assume(task.writes)
    other = graph.buffers[draw(st.sampled_from([*task.reads, *task.writes]))]
    assume(other.tier is graph.buffers[task.writes[0]].tier)
    last = (other.stop if other.slot else other.nbytes) - 1
    slot = Slot("one", other.tier, last + 3)
    moved = replace(other, slot="one")
    over = Buffer("over", draw(st.integers(1, 3)), other.tier, slot="one", offset=last)
    graph = replace(graph, slots={**graph.slots, "one": slot})
    graph = with_buffer(with_buffer(graph, moved), over)
    broken = with_task(graph, position, writes=(*task.writes, "over"))
    return broken, (f"task {task.name}", "over", other.name)


def a_buffer_beyond_its_slot(draw: st.DrawFn, graph: TaskGraph) -> Broken:
    """A buffer grows out of its slot."""
    inside = [b for b in graph.buffers.values() if b.slot]
    assume(inside)
    buffer = draw(st.sampled_from(inside))
    nbytes = graph.slots[buffer.slot].nbytes - buffer.offset + draw(st.integers(1, 1 << 40))
    return with_buffer(graph, replace(buffer, nbytes=nbytes)), (buffer.name, buffer.slot)


def a_size_out_of_range(draw: st.DrawFn, graph: TaskGraph) -> Broken:
    """A buffer has a size that no memory has."""
    assume(graph.buffers)
    buffer = graph.buffers[draw(st.sampled_from(sorted(graph.buffers)))]
    nbytes = draw(st.sampled_from([-1, -(1 << 63), 1 << 63, 1 << 80]))
    return with_buffer(graph, replace(buffer, nbytes=nbytes)), (
        f"buffer {buffer.name}",
        str(nbytes),
    )


@pytest.mark.parametrize(
    "mutation",
    [
        a_cycle,
        a_dangling_buffer,
        a_dangling_task,
        a_name_twice,
        a_read_too_early,
        a_slot_overlap,
        an_overlap_within_a_task,
        a_buffer_beyond_its_slot,
        a_size_out_of_range,
    ],
)
@settings(max_examples=25)
@given(data=st.data(), graph=task_graphs())
def test_a_mutation_that_breaks_a_rule_is_refused_by_name(
    mutation: Callable[[st.DrawFn, TaskGraph], Broken], data: st.DataObject, graph: TaskGraph
) -> None:
    verify(graph)
    broken, names = mutation(data.draw, graph)
    with pytest.raises(GraphError) as raised:
        verify(broken)
    assert all(name in str(raised.value) for name in names), str(raised.value)


@settings(max_examples=25)
@given(data=st.data(), graph=task_graphs())
def test_a_lane_that_is_not_its_kinds_is_refused_by_name(
    data: st.DataObject, graph: TaskGraph
) -> None:
    position, task = a_task(data.draw, graph)
    document = json.loads(to_json(graph))
    others = [lane.value for lane in Lane if lane is not LANE_OF[task.kind]]
    document["tasks"][position]["lane"] = lane = data.draw(st.sampled_from(others))
    with pytest.raises(GraphError, match=rf"task {task.name}: lane is {lane}, but kind"):
        from_json(json.dumps(document))
