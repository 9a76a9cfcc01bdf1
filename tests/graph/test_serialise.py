"""Graphs as JSON: exact round trips, and refusals that name the task, buffer or slot."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slideformer.graph.buffers import Buffer, Role, Tier
from slideformer.graph.builder import GraphBuilder
from slideformer.graph.errors import GraphError
from slideformer.graph.graph import TaskGraph
from slideformer.graph.serialise import from_json, to_json
from slideformer.graph.step import compile_evaluation, compile_save, compile_step
from slideformer.graph.tasks import LONGEST, Cost, Product, ProductKind, Task, TaskKind
from tests.support.graphs import task_graphs
from tests.support.specs import draft_plans, small_plan, small_spec, specs

Document = dict[str, Any]


def small_graph() -> TaskGraph:
    """One buffer up, doubled, and down again."""
    b = GraphBuilder("double")
    b.slot("s", Tier.GPU, 64)
    b.buffer("host", 16, Tier.PINNED, role=Role.WEIGHT, carried=True)
    b.buffer("gpu", 16, Tier.GPU, slot="s", offset=32)
    b.task("h2d.x", TaskKind.H2D, op="copy", reads=["host"], writes=["gpu"], cost=Cost(nbytes=16))
    b.task("fwd.x", TaskKind.COMPUTE, reads=["gpu"], writes=["gpu"], unit="x", micro=-1)
    b.task(
        "d2h.x",
        TaskKind.D2H,
        op="copy",
        reads=["gpu"],
        writes=["host"],
        after=["fwd.x"],
        cost=Cost(nbytes=16),
    )
    return b.build()


def assert_round_trip(graph: TaskGraph) -> None:
    """Equal in every field, in the same order, and to the last character."""
    text = to_json(graph)
    again = from_json(text)
    assert again == graph
    assert list(again.buffers) == list(graph.buffers)
    assert list(again.slots) == list(graph.slots)
    assert again.edges == graph.edges
    assert to_json(again) == text


@given(task_graphs())
def test_round_trip_of_any_graph(graph: TaskGraph) -> None:
    assert_round_trip(graph)


@settings(max_examples=20)
@given(st.data())
def test_round_trip_of_compiled_graphs(data: st.DataObject) -> None:
    spec = data.draw(specs())
    plan = data.draw(draft_plans(spec))
    for compile_graph in (compile_step, compile_evaluation, compile_save):
        assert_round_trip(compile_graph(spec, plan))


@given(
    name=st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20),
    seconds=st.floats(min_value=0, max_value=LONGEST),
    flops=st.integers(0, (1 << 63) - 1),
    product=st.builds(
        Product,
        st.sampled_from(ProductKind),
        st.integers(0, (1 << 63) - 1),
        st.integers(1, (1 << 63) - 1),
        st.integers(1, (1 << 63) - 1),
    ),
    args=st.dictionaries(
        st.sampled_from("abc"), st.integers() | st.text(st.characters(exclude_categories=["Cs"]))
    ),
)
def test_round_trip_of_any_value(
    name: str, seconds: float, flops: int, product: Product, args: dict[str, int | str]
) -> None:
    buffer = Buffer(name, 4, Tier.CPU, carried=True)
    cost = Cost(flops=flops, products=(product,), seconds=seconds)
    task = Task("cpu.x", TaskKind.CPU, name, (name,), (name,), (), cost, args)
    assert_round_trip(TaskGraph(name, (task,), {name: buffer}, {}))


def test_a_file_has_one_task_a_line_and_no_defaults() -> None:
    lines = to_json(small_graph()).splitlines()
    assert '{"name":"gpu","nbytes":16,"tier":"gpu","slot":"s","offset":32}' in lines
    assert [line for line in lines if '"kind":"COMPUTE"' in line] == [
        '{"name":"fwd.x","kind":"COMPUTE","lane":"compute","op":"fwd","reads":["gpu"],'
        '"writes":["gpu"],"args":{"unit":"x","micro":-1}},'
    ]


def test_a_value_without_json_form_is_not_written() -> None:
    graph = small_graph()
    task = Task("fwd.y", TaskKind.COMPUTE, "fwd", cost=Cost(seconds=float("inf")))
    broken = TaskGraph("g", (*graph.tasks, task), graph.buffers, graph.slots)
    with pytest.raises(GraphError, match=r"'fwd\.y' cannot .*: cost\.seconds is inf: .*finite"):
        to_json(broken)


@pytest.mark.parametrize("name", ["a\nb", "\x1b]0;x\x07", "\x9b1m", "x" * 257])
def test_a_title_that_a_terminal_would_obey_is_neither_written_nor_read(name: str) -> None:
    graph = small_graph()
    with pytest.raises(GraphError, match="name is"):
        to_json(TaskGraph(name, graph.tasks, graph.buffers, graph.slots))
    document = json.loads(to_json(graph)) | {"name": name}
    with pytest.raises(GraphError, match="name is") as caught:
        from_json(json.dumps(document))
    assert str(caught.value).replace("\n", "").isprintable()


def item(section: str, position: int, **changes: Any) -> Callable[[Document], None]:
    """A change of fields of one slot, buffer or task; ``...`` removes a field."""

    def change(document: Document) -> None:
        for field, value in changes.items():
            if value is ...:
                del document[section][position][field]
            else:
                document[section][position][field] = value

    return change


def top(**changes: Any) -> Callable[[Document], None]:
    """A change of fields of the document."""
    return lambda document: document.update(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (top(version=1), r"has version 1, this program reads version 2"),
        (top(version="1"), r"has version '1', this program reads version 2"),
        (top(format="dot"), r"not a task graph: format is 'dot'"),
        (top(extra=1), r"graph: extra is 1: Extra inputs are not permitted"),
        (top(tasks={}), r"graph: tasks is \{\}: .*array"),
        (item("tasks", 1, kind="GPU"), r"task fwd\.x: kind is 'GPU': .*'COMPUTE'"),
        (
            item("tasks", 1, lane="h2d"),
            r"task fwd\.x: lane is h2d, but kind COMPUTE runs",
        ),
        (item("tasks", 1, lane=...), r"task fwd\.x: lane: Field required"),
        (item("tasks", 1, name=...), r"task number 1: name: Field required"),
        (item("tasks", 1, op=""), r"task fwd\.x: op is ''"),
        (item("tasks", 1, hook="os.system"), r"task fwd\.x: hook is 'os.system': Extra inputs"),
        (item("tasks", 1, cost={"nbytes": -1}), r"task fwd\.x: cost\.nbytes is -1"),
        (
            item("tasks", 1, cost={"flops": 1 << 63}),
            r"task fwd\.x: cost\.flops is 922337203685",
        ),
        (item("tasks", 1, cost={"flops": 1e400}), r"cost\.flops is inf"),
        (
            item("tasks", 1, cost={"products": [{"kind": "forward", "flops": 1, "tokens": 0}]}),
            r"task fwd\.x: cost\.products\.0\.tokens is 0",
        ),
        (item("tasks", 1, cost={"seconds": -0.5}), r"task fwd\.x: cost\.seconds is -0\.5"),
        (item("tasks", 1, cost={"seconds": 1e308}), r"task fwd\.x: cost\.seconds is 1e\+308"),
        (item("tasks", 1, args={"lr": 0.1}), r"task fwd\.x: args\.lr"),
        (item("tasks", 1, args={"on": True}), r"task fwd\.x: args\.on"),
        (
            item("tasks", 1, reads=["nothing"]),
            r"task fwd\.x: reads 'nothing', which does",
        ),
        (item("tasks", 1, reads="gpu"), r"task fwd\.x: reads is 'gpu'"),
        (item("tasks", 1, reads=["host"]), r"task fwd\.x: reads host in pinned; COMPUTE may"),
        (item("tasks", 1, name="d2h.x"), r"task d2h\.x is listed twice"),
        (item("tasks", 1, name="fwd"), r"task name 'fwd' is malformed"),
        (item("tasks", 0, after=["d2h.x"]), r"tasks wait for each other: .*h2d\.x"),
        (item("tasks", 0, after=["d2h.z"]), r"task h2d\.x: runs after 'd2h\.z', which does not"),
        (item("tasks", 0, writes=[]), r"task fwd\.x: reads gpu before anything has written it"),
        (item("buffers", 0, nbytes=-1), r"buffer host: nbytes is -1"),
        (item("buffers", 0, nbytes=1 << 63), r"buffer host: nbytes is 9223372036854775808"),
        (item("buffers", 0, nbytes=16.5), r"buffer host: nbytes is 16\.5"),
        (item("buffers", 0, tier="disk"), r"buffer host: tier is 'disk': .*'nvme'"),
        (item("buffers", 0, role="x"), r"buffer host: role is 'x'"),
        (item("buffers", 0, carried="yes"), r"buffer host: carried is 'yes'"),
        (item("buffers", 0, name="gpu"), r"buffer gpu is listed twice"),
        (item("buffers", 0, name="a\nb"), r"name is 'a\\nb'"),
        (item("buffers", 1, slot="t"), r"buffer gpu: slot 't' does not exist"),
        (item("buffers", 1, offset=60), r"buffer gpu: bytes 60–76 do not fit into slot s of 64"),
        (item("slots", 0, nbytes=-64), r"slot s: nbytes is -64"),
        (item("slots", 0, tier="cpu"), r"buffer gpu: tier gpu, but slot s is in cpu"),
        (top(slots=[7]), r"slot number 0:.* is 7"),
    ],
)
def test_a_broken_file_is_refused_by_name(change: Callable[[Document], None], message: str) -> None:
    document = json.loads(to_json(small_graph()))
    change(document)
    with pytest.raises(GraphError, match=message):
        from_json(json.dumps(document))


@pytest.mark.parametrize(
    "text", ["", "[]", "7", "null", '{"format": ', "[" * 5000, b"\xff\xfe", b"\x80\x04K\x01."]
)
def test_what_is_no_graph_is_refused(text: str | bytes) -> None:
    with pytest.raises(GraphError, match="not a task graph"):
        from_json(text)


def test_a_message_stays_short_and_printable_whatever_the_file_has() -> None:
    changes = (
        top(format=["x" * 9999]),
        top(version="2" * 9999),
        item("tasks", 0, name="x." + "\x1b" * 9999),
        item("slots", 0, name=["x"] * 9999),
    )
    for change in changes:
        document = json.loads(to_json(small_graph()))
        change(document)
        with pytest.raises(GraphError) as caught:
            from_json(json.dumps(document))
        assert len(str(caught.value)) < 500
        assert str(caught.value).replace("\n", "").isprintable()


def test_all_problems_come_in_one_message() -> None:
    document = json.loads(to_json(small_graph()))
    document["tasks"][0]["kind"] = "UP"
    document["tasks"][2]["cost"]["nbytes"] = -1
    document["buffers"][0]["nbytes"] = -1
    with pytest.raises(GraphError, match=r"3 problem") as caught:
        from_json(json.dumps(document))
    assert all(name in str(caught.value) for name in ("h2d.x", "host", "d2h.x"))


def test_a_long_list_of_problems_is_cut() -> None:
    document = json.loads(to_json(compile_step(small_spec(), small_plan())))
    for task in document["tasks"]:
        task["cost"] = {"nbytes": -1}
    with pytest.raises(GraphError) as caught:
        from_json(json.dumps(document))
    assert len(str(caught.value).splitlines()) == 22
    assert "more" in str(caught.value).splitlines()[-1]
