"""Running a user's own graph: results, refusals, and failures that name the task."""

from __future__ import annotations

import asyncio
import gc
import math
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slideformer.graph.buffers import Tier
from slideformer.graph.builder import GraphBuilder
from slideformer.graph.errors import (
    BudgetError,
    ConfigError,
    DeviceError,
    GraphError,
    PolicyError,
    TaskError,
)
from slideformer.graph.graph import TaskGraph
from slideformer.graph.plan import Budgets
from slideformer.graph.tasks import Task, TaskKind
from slideformer.running import RunResult, run
from slideformer.simulation import simulate
from tests.support.graphs import task_graphs

Memory = tuple[Tensor, ...]


def scale_graph(tier: Tier = Tier.GPU) -> TaskGraph:
    """``x`` comes up, is doubled twice on the GPU and goes down into itself."""
    b = GraphBuilder("scale")
    b.buffer("x", 16, Tier.PINNED, carried=True)
    b.slot("s", tier, 32)
    b.buffer("y", 16, tier, slot="s")
    b.buffer("z", 16, tier, slot="s", offset=16)
    b.task("h2d.x", TaskKind.H2D, op="copy", reads=["x"], writes=["y"])
    b.task("fwd.y", TaskKind.COMPUTE, op="double", reads=["y"], writes=["z"])
    b.task("bwd.z", TaskKind.COMPUTE, op="double", reads=["z"], writes=["z"])
    b.task("d2h.z", TaskKind.D2H, op="copy", reads=["z"], writes=["x"])
    return b.build()


def copy(task: Task, reads: Memory, writes: Memory) -> None:
    """Copy one buffer."""
    writes[0].copy_(reads[0], non_blocking=True)


def double(task: Task, reads: Memory, writes: Memory) -> None:
    """Double FP32 values."""
    torch.mul(reads[0].view(torch.float32), 2, out=writes[0].view(torch.float32))


BINDINGS = {"copy": copy, "double": double}


def go(graph: TaskGraph, bindings: Any = None, **more: Any) -> RunResult:
    """Run a graph from outside a loop."""
    return asyncio.run(run(graph, BINDINGS if bindings is None else bindings, **more))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("policy", ["fifo", "critical-path", "earliest-deadline"])
def test_a_graph_computes_what_its_callables_compute(device: str, policy: str) -> None:
    x = torch.tensor([1.0, -2.0, 3.5, 0.0])
    result = go(scale_graph(), device=device, policy=policy, instances=3, contents={"x": x})
    assert torch.equal(result.contents["x"].view(torch.float32), x * 64)
    assert result.contents.keys() == {"x"}
    assert [s.task for s in result.timeline.instance(1).spans].count("fwd.y") == 1
    assert len(result.timeline.spans) == 12
    assert result.timeline.peaks()[Tier.GPU] == 32


def test_callables_get_memory_in_the_order_of_the_task() -> None:
    seen: dict[str, tuple[list[int], list[int]]] = {}

    def look(task: Task, reads: Memory, writes: Memory) -> None:
        seen[task.name] = ([len(r) for r in reads], [len(w) for w in writes])

    b = GraphBuilder()
    for size in (1, 2, 3):
        b.buffer(f"b{size}", size, Tier.CPU, carried=True)
    b.task("one.x", TaskKind.CPU, op="look", reads=["b3", "b1"], writes=["b2", "b3"])
    go(b.build(), {"look": look})
    assert seen == {"one.x": ([3, 1], [2, 3])}


def test_carried_buffers_start_as_zeros() -> None:
    assert not go(scale_graph()).contents["x"].any()


@settings(max_examples=25)
@given(task_graphs(), st.sampled_from(["fifo", "critical-path", "earliest-deadline"]))
def test_every_policy_leaves_the_same_bytes(graph: TaskGraph, policy: str) -> None:
    """Bytes depend on the program order alone; the reference runs it task by task."""
    if any(b.tier is Tier.NVME for b in graph.buffers.values()):
        with pytest.raises(GraphError, match="is on NVMe"):
            go(graph, {"mix": mix})
        return
    places = {b.place: torch.zeros(8, dtype=torch.uint8) for b in graph.buffers.values()}
    memory = {b.name: places[b.place][b.offset : b.stop] for b in graph.buffers.values()}
    for task in graph.tasks:
        mix(task, tuple(memory[n] for n in task.reads), tuple(memory[n] for n in task.writes))
    result = go(graph, {"mix": mix}, policy=policy)
    for name, tensor in result.contents.items():
        assert torch.equal(tensor, memory[name])


async def later(task: Task, reads: Memory, writes: Memory) -> None:
    """What nobody would wait for."""


def mix(task: Task, reads: Memory, writes: Memory) -> None:
    """Write what depends on the task and on everything it reads."""
    total = sum(int(r.sum()) for r in reads) + sum(map(ord, task.name))
    for position, target in enumerate(writes):
        target.fill_((total + position) % 251)


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ({"bindings": {"copy": copy}}, GraphError, r"task fwd\.y: op 'double' has no binding"),
        ({"contents": {"w": torch.ones(4)}}, GraphError, r"'w', which is not a buffer of graph"),
        ({"contents": {"y": torch.ones(4)}}, GraphError, r"'y', which is not carried of graph"),
        ({"contents": {"x": torch.ones(5)}}, GraphError, r"x have 20 bytes, the buffer has 16"),
        ({"contents": {"x": [1.0] * 4}}, GraphError, "contents for 'x' are a list, not a tensor"),
        ({"contents": {"x": torch.ones(4).to_sparse()}}, GraphError, "for 'x' are no plain tensor"),
        ({"contents": {"x": torch.ones(4, device="meta")}}, GraphError, "are no plain tensor"),
        ({"bindings": {"copy": copy, "double": 2}}, GraphError, "'double' is bound to 2, which ca"),
        ({"bindings": {"copy": copy, "double": later}}, GraphError, "a coroutine function; bind a"),
        ({"instances": 0}, ConfigError, "instances is 0; it must be a whole number of at least 1"),
        ({"instances": 1.5}, ConfigError, r"instances is 1\.5; it must be a whole number"),
        ({"timeout": -1}, ConfigError, "timeout is -1; it must be seconds, more than 0, or None"),
        ({"timeout": math.nan}, ConfigError, "timeout is nan; it must be seconds"),
        ({"policy": object()}, PolicyError, "policy 'object' raised AttributeError"),
        ({"policy": "lifo"}, ConfigError, r"unknown policy 'lifo'; did you mean 'fifo'"),
        ({"device": "tpu"}, ConfigError, r"device is 'tpu'; use auto, cuda or cpu"),
        (
            {"budgets": Budgets(0, 4096)},
            BudgetError,
            r"task h2d\.x: s of 32 B brings graph 'scale' to 8\.00 KiB of host memory, "
            r"the budget is 4\.00 KiB",
        ),
    ],
)
def test_what_cannot_run_is_refused(
    more: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        go(scale_graph(), **more)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_refused() -> None:
    with pytest.raises(DeviceError, match="device is 'cuda', but "):
        go(scale_graph(), device="cuda")


def test_just_enough_memory_is_enough() -> None:
    go(scale_graph(), budgets=Budgets(0, 8192))
    with pytest.raises(BudgetError):
        go(scale_graph(), budgets=Budgets(0, 8191))


def test_a_callable_that_raises_fails_the_run_by_its_task() -> None:
    def fail(task: Task, reads: Memory, writes: Memory) -> None:
        raise ZeroDivisionError("by hand")

    before = threading.active_count()
    with pytest.raises(TaskError, match=r"fwd\.y#0 failed: ZeroDivisionError: by hand") as caught:
        go(scale_graph(), {"copy": copy, "double": fail}, instances=2, timeout=30.0)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert threading.active_count() == before


class Untold(BaseException):
    """An error that cannot even be shown."""

    def __str__(self) -> str:
        raise RuntimeError("no words")

    __repr__ = __str__


class Particular(TaskError):
    """An error of ours that is made in a way of its own."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (Untold(), "Untold: <Untold that cannot be shown>"),
        (Particular(1, 2), "Particular: 1 and 2"),
        (SystemExit(3), "SystemExit: 3"),
    ],
)
def test_whatever_a_callable_raises_fails_the_run(error: BaseException, message: str) -> None:
    def fail(*_: Any) -> None:
        raise error

    with pytest.raises(TaskError, match=f"fwd.y#0 failed: {message}"):
        go(scale_graph(), {"copy": copy, "double": fail}, timeout=20.0)


def test_a_callable_that_does_not_return_fails_the_run_and_is_named() -> None:
    released = threading.Event()

    def hang(task: Task, reads: Memory, writes: Memory) -> None:
        released.wait(60)

    before = threading.active_count()
    started = time.monotonic()
    with pytest.raises(
        TaskError,
        match=r"fwd\.y#0 has not returned after 0\.2 s; left running: fwd\.y#0 in thread slidef",
    ):
        go(scale_graph(), {"copy": copy, "double": hang}, timeout=0.2)
    assert time.monotonic() - started < 10
    released.set()
    while threading.active_count() > before and time.monotonic() - started < 20:
        time.sleep(0.01)
    assert threading.active_count() == before


def test_tasks_shorter_than_the_timeout_may_together_take_longer() -> None:
    def slow(task: Task, reads: Memory, writes: Memory) -> None:
        time.sleep(0.15)

    go(scale_graph(), {"copy": copy, "double": slow}, instances=3, timeout=0.6)


HANGING = """
import asyncio, time
from slideformer.graph.errors import TaskError
from slideformer.running import run
from tests.slideformer.test_running import copy, scale_graph
try:
    hanging = {"copy": copy, "double": lambda *_: time.sleep(600)}
    asyncio.run(run(scale_graph(), hanging, timeout=0.1))
except TaskError as error:
    print(error)
"""


def test_a_process_ends_although_a_callable_hangs() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HANGING], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "fwd.y#0 has not returned" in done.stdout


def test_a_run_can_be_cancelled() -> None:
    entered, released = threading.Event(), threading.Event()

    def hang(task: Task, reads: Memory, writes: Memory) -> None:
        entered.set()
        released.wait(60)

    async def cancel() -> None:
        running = asyncio.ensure_future(run(scale_graph(), {"copy": copy, "double": hang}))
        await asyncio.to_thread(entered.wait)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    asyncio.run(cancel())
    released.set()


class Asynchronous:
    """What is called like a function and does its work only where it is awaited."""

    async def __call__(self, task: Task, reads: Memory, writes: Memory) -> None:
        """What nobody would wait for."""


def generator(task: Task, reads: Memory, writes: Memory) -> Iterator[None]:
    """What does nothing until it is asked for its values."""
    yield


@pytest.mark.parametrize("call", [Asynchronous(), lambda *given: later(*given), generator])
def test_a_callable_that_puts_off_its_work_fails_the_run(call: Any) -> None:
    with pytest.raises(TaskError, match=r"fwd\.y#0: op 'double' returned a (corout|generat)"):
        go(scale_graph(), {"copy": copy, "double": call})


def test_memory_that_a_callable_reshapes_is_whole_in_the_next_instance() -> None:
    def reshape(task: Task, reads: Memory, writes: Memory) -> None:
        double(task, reads, writes)
        reads[0].unsqueeze_(0)
        writes[0].resize_(0)

    x = torch.tensor([1.0, -2.0, 3.5, 0.0])
    result = go(scale_graph(), {"copy": copy, "double": reshape}, instances=3, contents={"x": x})
    assert torch.equal(result.contents["x"].view(torch.float32), x * 64)


def test_a_graph_that_was_edited_into_a_broken_one_is_refused() -> None:
    graph = scale_graph()
    first, *others = graph.tasks
    for tasks, message in (
        (others, r"task fwd\.y: reads y before anything has written it"),
        ([replace(first, after=("d2h.z",)), *others], "tasks wait for each other: .*h2d.x"),
        ([replace(first, reads=("w",)), *others], r"task h2d\.x: reads 'w', which does not exist"),
    ):
        with pytest.raises(GraphError, match=message):
            go(replace(graph, tasks=tuple(tasks)))


class Hostile:
    """A policy that misbehaves in one way."""

    name = "hostile"

    def __init__(self, way: str) -> None:
        self.way = way

    def prepare(self, graph: object, profile: object) -> None:
        """Nothing to prepare."""

    def choose(self, lane: object, ready: Any) -> Any:
        """The wrong thing."""
        last = ready[0].instance.runs[-1]
        match self.way:
            case "raise":
                raise KeyError("lost")
            case "exit":
                raise SystemExit(1)
            case "untold":
                raise Untold
            case "ahead":  # the run's own list, so that what is chosen is in it
                ready.append(last)
                return last
            case "lose":
                ready.clear()
        return {"idle": None, "lose": None, "unreal": AlwaysEqual()}.get(
            self.way, replace(ready[0]) if ready else None
        )


class AlwaysEqual:
    """What passes for anything that it is compared with."""

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


def test_a_run_that_fails_before_all_of_it_is_submitted_is_told_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pytest.raises(PolicyError, match="leaves every lane idle") as failure:
        go(scale_graph(), policy=Hostile("idle"), instances=2)
    del failure
    gc.collect()  # asyncio complains when an error goes that nobody has looked at
    assert caplog.records == []


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("raise", r"raised KeyError"),
        ("exit", r"raised SystemExit\(1\) on lane h2d"),
        ("untold", "raised <Untold that cannot be shown>"),
        ("idle", r"leaves every lane idle"),
        ("lose", r"leaves every lane idle"),
        ("other", r"not ready"),
        ("unreal", r"not ready"),
        ("ahead", r"chose \w+\.\w+#0 on lane h2d, not ready"),
    ],
)
def test_a_hostile_policy_fails_the_run_by_its_name(way: str, message: str) -> None:
    with pytest.raises(PolicyError, match=f"'hostile'.*{message}"):
        go(scale_graph(), policy=Hostile(way))
    with pytest.raises(PolicyError, match=f"'hostile'.*{message}"):
        simulate(scale_graph(), "h100", Hostile(way))


@pytest.mark.parametrize("field", ["position", "instance"])
def test_a_policy_that_changes_what_it_is_shown_does_not_hang_the_run(field: str) -> None:
    class Saboteur(Hostile):
        """Spoils the second task that it may choose."""

        chosen = 0

        def choose(self, lane: object, ready: Any) -> Any:
            """The first, changed."""
            self.chosen += 1
            if self.chosen == 2:
                setattr(ready[0], field, 99)
            return ready[0]

    async def bounded() -> None:
        run_it = run(scale_graph(), BINDINGS, policy=Saboteur("change"))
        await asyncio.wait_for(run_it, timeout=20)

    with pytest.raises(PolicyError, match="scheduling by policy 'hostile' broke: "):
        asyncio.run(bounded())
