"""The scheduler on real threads: sequential results, clean failures, nothing left behind."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slideformer.graph.buffers import Tier
from slideformer.graph.builder import GraphBuilder
from slideformer.graph.errors import (
    GraphError,
    NonFiniteError,
    PolicyError,
    SlideFormerError,
    TaskError,
)
from slideformer.graph.graph import TaskGraph
from slideformer.graph.profile import MachineProfile
from slideformer.graph.tasks import Lane, Task, TaskKind
from slideformer.runtime.cpu import CpuDevice
from slideformer.runtime.device import Operation, bind
from slideformer.runtime.policies import Fifo, Policy, make_policy, policy_names
from slideformer.runtime.runs import TaskRun
from slideformer.runtime.scheduler import Scheduler
from slideformer.runtime.trace import Trace
from tests.support.graphs import Machine, run_sequentially, task_graphs


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    """Whatever a test does, its threads are gone in the end."""
    before = set(threading.enumerate())
    yield
    left = [thread.name for thread in threading.enumerate() if thread not in before]
    assert not left


def free(*kinds: TaskKind) -> TaskGraph:
    """Tasks ``t0.x``, ``t1.x``, … that do not wait for each other."""
    builder = GraphBuilder("free")
    for number, kind in enumerate(kinds):
        builder.task(f"t{number}.x", kind)
    return builder.build()


def counter(tasks: int = 1) -> TaskGraph:
    """Tasks that all change the same bytes."""
    builder = GraphBuilder("count")
    total = builder.buffer("total", 8, Tier.CPU, carried=True)
    for number in range(tasks):
        builder.task(f"add.n{number}", TaskKind.CPU, reads=[total], writes=[total])
    return builder.build()


def nothing(_: object) -> None:
    """An operation without effect."""


@settings(max_examples=40)
@given(
    st.lists(task_graphs(max_tasks=10), min_size=1, max_size=3),
    st.sampled_from(policy_names()),
    st.dictionaries(st.sampled_from(Lane), st.integers(1, 3)),
    st.integers(0, 10**6),
)
def test_overlapping_instances_give_the_sequential_result(
    graphs: list[TaskGraph], name: str, widths: dict[Lane, int], seed: int
) -> None:
    programs = random.Random(seed).choices(graphs, k=4)
    machine = Machine()

    def dawdling(operation: Operation) -> Operation:
        """Give other threads every chance to be wrong."""
        pause = random.Random(seed).random() * 1e-4

        def run(context: Any) -> None:
            time.sleep(pause)
            operation(context)

        return run

    async def run() -> None:
        profile = MachineProfile(widths=widths)
        scheduler = Scheduler(CpuDevice(dict(widths)), make_policy(name), profile)
        done = [
            scheduler.submit(graph, [dawdling(o) for o in machine.operations(graph)], str(number))
            for number, graph in enumerate(programs)
        ]
        await asyncio.gather(*done)
        await scheduler.close()

    asyncio.run(run())
    expected = run_sequentially(programs)
    assert machine.seen == expected.seen
    assert machine.memory == expected.memory


def test_a_wide_lane_really_runs_tasks_at_once() -> None:
    together = threading.Barrier(3, timeout=10)

    async def run() -> None:
        profile = MachineProfile(widths={Lane.CPU: 3})
        scheduler = Scheduler(CpuDevice({Lane.CPU: 3}), Fifo(), profile)
        graph = free(*[TaskKind.CPU] * 3)
        await scheduler.submit(graph, [lambda _: together.wait()] * 3)
        await scheduler.close()

    asyncio.run(run())


def test_a_context_reaches_the_operations_of_its_own_instance() -> None:
    seen: list[tuple[int, object]] = []

    async def run() -> None:
        scheduler = Scheduler(CpuDevice(), Fifo())
        graph = counter(2)
        operations: list[Operation] = [lambda c, i=i: seen.append((i, c)) for i in range(2)]
        await asyncio.gather(*(scheduler.submit(graph, operations, c) for c in "abc"))
        await scheduler.close()

    asyncio.run(run())
    assert seen == [(i, c) for c in "abc" for i in range(2)]


def test_a_close_with_nothing_submitted() -> None:
    async def run() -> None:
        await Scheduler(CpuDevice(), Fifo()).close()

    asyncio.run(run())


def test_a_close_waits_for_what_was_submitted() -> None:
    done: list[str] = []

    async def run() -> None:
        scheduler = Scheduler(CpuDevice(), Fifo())
        for name in "ab":
            scheduler.submit(counter(), [lambda c: (time.sleep(0.05), done.append(c))], name)
        await scheduler.close()

    asyncio.run(run())
    assert done == ["a", "b"]


def test_an_empty_graph_is_done_at_once() -> None:
    async def run() -> None:
        scheduler = Scheduler(CpuDevice(), Fifo())
        await asyncio.wait_for(scheduler.submit(TaskGraph("empty", (), {}, {}), []), 5)
        await scheduler.close()

    asyncio.run(run())


def test_every_task_is_recorded_with_its_time() -> None:
    trace = Trace()

    async def run() -> None:
        scheduler = Scheduler(CpuDevice(), Fifo(), trace=trace)
        await scheduler.submit(counter(3), [lambda _: time.sleep(0.01)] * 3)
        await scheduler.close()

    asyncio.run(run())
    spans = trace.timeline().spans
    assert [span.task for span in spans] == ["add.n0", "add.n1", "add.n2"]
    assert all(span.seconds >= 0.01 for span in spans)
    assert all(a.stopped <= b.started for a, b in pairwise(spans))


# Failures


class Boom(BaseException):
    """Not even an `Exception`."""


@settings(max_examples=25)
@given(
    task_graphs(max_tasks=10).filter(lambda graph: bool(graph.tasks)),
    st.sampled_from(policy_names()),
    st.data(),
)
def test_a_failing_task_fails_the_run_by_its_name(
    graph: TaskGraph, name: str, data: st.DataObject
) -> None:
    position = data.draw(st.integers(0, len(graph.tasks) - 1))
    instance = data.draw(st.integers(0, 2))
    error = data.draw(st.sampled_from([ValueError("bad"), Boom("bad"), StopIteration("bad")]))
    machine = Machine()
    operations = machine.operations(graph)
    sound = operations[position]

    def fail(context: str) -> None:
        if context == str(instance):
            raise error
        sound(context)

    operations[position] = fail

    async def run() -> list[BaseException | None]:
        scheduler = Scheduler(CpuDevice({Lane.CPU: 2}), make_policy(name))
        done = [scheduler.submit(graph, operations, str(number)) for number in range(3)]
        ends = await asyncio.gather(*done, return_exceptions=True)
        with pytest.raises(TaskError):
            scheduler.submit(graph, operations, "late")
        await scheduler.close()
        return ends

    started = time.perf_counter()
    ends = asyncio.run(run())
    assert time.perf_counter() - started < 1.0
    failed = [end for end in ends if end is not None]
    assert failed, "the instance with the failing task cannot have succeeded"
    assert ends[instance] is not None
    task = graph.tasks[position].name
    for end in failed:
        assert isinstance(end, TaskError)
        assert str(end).startswith(f"{task}#{instance} failed: {type(error).__name__}: bad")
    expected = run_sequentially([graph] * 3).seen
    assert all(expected[key] == values for key, values in machine.seen.items())


def test_nothing_new_starts_after_a_failure_and_what_runs_may_end() -> None:
    ran: list[str] = []

    def slow(_: object) -> None:
        time.sleep(0.2)
        ran.append("slow")

    def fail(_: object) -> None:
        raise ValueError("bad")

    async def run() -> None:
        scheduler = Scheduler(CpuDevice(), Fifo())
        graph = free(TaskKind.CPU, TaskKind.SAVE, TaskKind.CPU, TaskKind.SAVE)
        operations: list[Operation] = [slow, fail, *[lambda _: ran.append("new")] * 2]
        with pytest.raises(TaskError, match=r"t1\.x#0 failed: ValueError: bad"):
            await scheduler.submit(graph, operations)
        assert ran == ["slow"], "the run ends when nothing is in flight any more"
        await scheduler.close()

    asyncio.run(run())


def test_an_error_for_the_user_keeps_its_class() -> None:
    def fail(_: object) -> None:
        raise NonFiniteError("infinite")

    async def run() -> None:
        scheduler = Scheduler(CpuDevice(), Fifo())
        with pytest.raises(NonFiniteError, match=r"^add\.n0#0: infinite$"):
            await scheduler.submit(counter(), [fail])
        await scheduler.close()

    asyncio.run(run())


class Unprepared(Fifo):
    """Fails before the first choice."""

    name = "unprepared"

    def prepare(self, graph: TaskGraph, profile: MachineProfile) -> None:
        """Raise."""
        raise ZeroDivisionError("no profile")


class Idle(Fifo):
    """Never chooses."""

    name = "idle"

    def choose(self, lane: Lane, ready: Sequence[TaskRun]) -> TaskRun | None:
        """Nothing."""
        return None


@pytest.mark.parametrize(
    ("policy", "words"),
    [(Unprepared(), "raised ZeroDivisionError"), (Idle(), "leaves every lane idle")],
)
def test_a_policy_that_breaks_its_contract_fails_the_run(policy: Policy, words: str) -> None:
    async def run() -> None:
        scheduler = Scheduler(CpuDevice(), policy)
        with pytest.raises(PolicyError, match=f"policy '{policy.name}' {words}"):
            await scheduler.submit(counter(), [nothing])
        await scheduler.close()

    asyncio.run(run())


def test_too_few_operations_are_refused() -> None:
    async def run() -> None:
        scheduler = Scheduler(CpuDevice(), Fifo())
        with pytest.raises(GraphError, match="'count' has 2 tasks, but 1 operation"):
            scheduler.submit(counter(2), [nothing])
        await asyncio.wait_for(scheduler.submit(counter(2), [nothing] * 2), 5)
        await scheduler.close()

    asyncio.run(run())


def test_giving_up_waiting_does_not_disturb_the_run() -> None:
    ran: list[int] = []

    async def run() -> None:
        scheduler = Scheduler(CpuDevice(), Fifo())
        graph = counter(2)
        operations: list[Operation] = [lambda _: (time.sleep(0.1), ran.append(1))] * 2
        abandoned = scheduler.submit(graph, operations)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(abandoned, 0.01)
        await asyncio.wait_for(scheduler.submit(graph, operations), 5)
        assert len(ran) == 4
        scheduler.submit(graph, operations).cancel()
        await scheduler.close()
        assert len(ran) == 6, "a close waits for it all the same"

    asyncio.run(run())


def test_a_policy_is_prepared_for_each_graph_once() -> None:
    """Also when a graph is made where one lay that is gone."""
    prepared: list[str] = []

    class Noting(Fifo):
        def prepare(self, graph: TaskGraph, profile: MachineProfile) -> None:
            prepared.append(graph.name)

    async def run() -> None:
        scheduler = Scheduler(CpuDevice(), Noting())
        for number in range(20):
            graph = TaskGraph(f"g{number}", (Task("a.x", TaskKind.CPU, "a"),), {}, {})
            await asyncio.gather(*(scheduler.submit(graph, [nothing]) for _ in range(2)))
            del graph
        await scheduler.close()

    asyncio.run(run())
    assert prepared == [f"g{number}" for number in range(20)]


# Binding


class Everywhere:
    """Memory that names what it is asked for."""

    def view(self, buffer: Any) -> str:
        """The buffer's name."""
        return f"view of {buffer.name}"


def test_a_binding_gets_views_of_what_its_task_touches() -> None:
    builder = GraphBuilder()
    a, b, c = (builder.buffer(n, 4, Tier.CPU, carried=True) for n in "abc")
    builder.task("mix.x", TaskKind.CPU, reads=[a, b], writes=[b])
    builder.task("mix.y", TaskKind.CPU, reads=[c])
    asked: list[tuple[str, dict[str, str]]] = []

    def mix(task: Task, views: Any) -> Operation:
        asked.append((task.name, dict(views)))
        return nothing

    assert bind(builder.build(), {"mix": mix}, Everywhere()) == [nothing, nothing]
    assert asked == [
        ("mix.x", {"a": "view of a", "b": "view of b"}),
        ("mix.y", {"c": "view of c"}),
    ]


@pytest.mark.parametrize(("bound", "told"), [({}, "none"), ({"sub": None}, "sub")])
def test_an_op_without_binding_is_named(bound: dict[str, Any], told: str) -> None:
    with pytest.raises(GraphError, match=rf"task add\.n0: op 'add' has no binding; bound: {told}"):
        bind(counter(), bound, Everywhere())


def test_errors_are_for_the_user() -> None:
    assert issubclass(TaskError, SlideFormerError)
    assert issubclass(PolicyError, SlideFormerError)


@pytest.mark.parametrize("spoilt", [2, 4])
def test_nothing_more_starts_once_scheduling_broke(spoilt: int) -> None:
    class Saboteur(Fifo):
        """Spoils a task: one that starts with the instance, or one that starts later."""

        chosen = 0

        def choose(self, lane: Lane, ready: Sequence[TaskRun]) -> TaskRun | None:
            """The first, changed."""
            self.chosen += 1
            if self.chosen == spoilt:
                ready[0].position = 99
            return ready[0]

    graph, ran = free(*[TaskKind.CPU, TaskKind.COMPUTE] * 4), []
    operations: list[Operation] = [lambda _, n=n: ran.append(n) for n in range(8)]

    async def go() -> None:
        scheduler = Scheduler(CpuDevice(), Saboteur())
        try:
            for _ in range(2):
                with pytest.raises(PolicyError, match="broke: IndexError"):
                    await scheduler.submit(graph, operations)
        finally:
            await scheduler.close()

    asyncio.run(go())
    assert len(ran) < 8
