"""The scheduler in a thread of its own, used from plain threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from slideformer.graph.buffers import Tier
from slideformer.graph.builder import GraphBuilder
from slideformer.graph.errors import DeviceError, TaskError
from slideformer.graph.graph import TaskGraph
from slideformer.graph.tasks import TaskKind
from slideformer.runtime.cpu import CpuDevice
from slideformer.runtime.loop import SchedulerThread
from slideformer.runtime.policies import Fifo
from slideformer.runtime.runs import Event


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    """Whatever a test does, its threads are gone in the end."""
    before = set(threading.enumerate())
    yield
    assert not [thread.name for thread in threading.enumerate() if thread not in before]


@pytest.fixture
def scheduler() -> Iterator[SchedulerThread]:
    """A scheduler on host threads."""
    made = SchedulerThread(CpuDevice(), Fifo())
    yield made
    made.close()


def counter(tasks: int) -> TaskGraph:
    """Tasks that all change the same bytes."""
    builder = GraphBuilder("count")
    total = builder.buffer("total", 8, Tier.CPU, carried=True)
    for number in range(tasks):
        builder.task(f"add.n{number}", TaskKind.CPU, reads=[total], writes=[total])
    return builder.build()


def test_several_threads_may_submit(scheduler: SchedulerThread) -> None:
    graph, total = counter(3), [0]

    def add(_: object) -> None:  # lost updates show if two run at once
        value = total[0]
        time.sleep(0)
        total[0] = value + 1

    def submit() -> list[Future[None]]:
        return [scheduler.submit(graph, [add] * 3) for _ in range(10)]

    with ThreadPoolExecutor(4) as pool:
        futures = [
            future for work in [pool.submit(submit) for _ in range(4)] for future in work.result()
        ]
    for future in futures:
        future.result(timeout=10)
    assert total[0] == 4 * 10 * 3


def test_a_future_ends_as_its_instance_does(scheduler: SchedulerThread) -> None:
    release = threading.Event()
    future = scheduler.submit(counter(1), [lambda _: release.wait(10)])
    assert not future.done()
    release.set()
    assert future.result(timeout=10) is None


def test_a_failure_reaches_every_open_future_and_every_later_one(
    scheduler: SchedulerThread,
) -> None:
    graph = counter(2)

    def fail(_: object) -> None:
        raise ValueError("bad")

    started = time.perf_counter()
    futures = [scheduler.submit(graph, [fail, fail]) for _ in range(3)]
    for future in futures:
        with pytest.raises(TaskError, match=r"add\.n0#0 failed: ValueError: bad"):
            future.result(timeout=10)
    assert time.perf_counter() - started < 1.0
    with pytest.raises(TaskError, match=r"add\.n0#0 failed"):
        scheduler.submit(graph, [fail, fail]).result(timeout=10)


def test_a_busy_caller_does_not_delay_the_run(scheduler: SchedulerThread) -> None:
    graph = counter(20)
    future = scheduler.submit(graph, [lambda _: None] * 20)
    deadline = time.perf_counter() + 10
    while not future.done() and time.perf_counter() < deadline:
        pass
    assert future.done()


def test_a_cancelled_future_does_not_disturb_the_run(scheduler: SchedulerThread) -> None:
    ran: list[int] = []
    graph = counter(2)
    slow: list[Callable[[object], object]] = [lambda _: (time.sleep(0.05), ran.append(1))] * 2
    scheduler.submit(graph, slow).cancel()
    scheduler.submit(graph, slow).result(timeout=10)
    assert len(ran) in (2, 4), "the first may not have begun yet"


@pytest.mark.parametrize("times", [1, 2])
def test_a_close_with_nothing_submitted(times: int) -> None:
    scheduler = SchedulerThread(CpuDevice(), Fifo())
    for _ in range(times):
        scheduler.close()


def test_a_close_waits_for_what_was_submitted() -> None:
    ran: list[int] = []
    scheduler = SchedulerThread(CpuDevice(), Fifo())
    for _ in range(3):
        scheduler.submit(counter(1), [lambda _: (time.sleep(0.02), ran.append(1))])
    scheduler.close()
    assert len(ran) == 3


def test_after_a_close_nothing_can_be_submitted() -> None:
    scheduler = SchedulerThread(CpuDevice(), Fifo())
    scheduler.close()
    with pytest.raises(RuntimeError, match="closed"):
        scheduler.submit(counter(1), [lambda _: None])


def test_a_device_that_does_not_start_leaves_no_thread() -> None:
    class Dead(CpuDevice):
        def start(self, post: Callable[[Event], None]) -> None:
            raise DeviceError("no such device")

    with pytest.raises(DeviceError, match="no such device"):
        SchedulerThread(Dead(), Fifo())
