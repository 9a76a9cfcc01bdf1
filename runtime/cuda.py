"""A CUDA device: compute and both copy directions on streams of their own, host lanes on threads.

One thread launches everything, so that a stream only ever waits for an event already recorded. One
thread per stream lane waits for its tasks' events and reports them; nothing else synchronises.
"""

from __future__ import annotations

import functools
import gc
import queue
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch

from slideformer.graph.tasks import HOST_LANES, STREAM_LANES, Lane
from slideformer.runtime.cpu import LaneThreads, Work
from slideformer.runtime.runs import Event, Failed, Finished, TaskRun

_SWITCH_SECONDS = 1e-4


@functools.cache
def _streams(index: int) -> dict[Lane, torch.cuda.Stream]:
    """The streams of a GPU's lanes, the same for every run of this process.

    cuBLAS keeps a workspace for every stream that it was used on, for good.
    """
    return {lane: torch.cuda.Stream(index) for lane in Lane if lane in STREAM_LANES}


class CudaDevice:
    """Stream lanes on one GPU; the host lanes run on threads as on the CPU device.

    ``workspace`` is how many bytes the temporaries of its tasks take at most.
    """

    stream_lanes = STREAM_LANES

    def __init__(self, index: int, workspace: int = 0) -> None:
        self._index = index
        self._workspace = workspace
        self._streams = _streams(index)
        self._launches: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._events: dict[TaskRun, torch.cuda.Event] = {}

    def start(self, post: Callable[[Event], None]) -> None:
        """Start all threads.

        Python hands its lock from a busy thread to a waiting one every 5 ms by default; here that
        would keep finished events, decisions and launches waiting for each other. Its collector of
        cycles stops all threads, for 0.3 s where torch and transformers are loaded; what is there
        now it passes over until `close`.
        """
        sys.setswitchinterval(_SWITCH_SECONDS)
        gc.collect()
        gc.freeze()
        self._post = post
        self._origin = _timed_event()
        self._origin.record(self._streams[Lane.COMPUTE])
        self._origin.synchronize()
        self._origin_time = time.perf_counter()
        self._host = {lane: LaneThreads(lane, 1, post) for lane in HOST_LANES}
        self._waiters = {lane: _Waiter(lane, self._wait) for lane in STREAM_LANES}
        self._launcher = threading.Thread(
            target=self._serve, name="slideformer-launcher", daemon=True
        )
        self._launcher.start()

    def launch(self, launches: Sequence[Work]) -> None:
        """Queue stream tasks for the launcher and host tasks on their threads."""
        for work in launches:
            lane = work[0].run.task.lane
            if lane in STREAM_LANES:
                self._launches.put(work)
            else:
                self._host[lane].put(work)

    def close(self) -> None:
        """End all threads."""
        self._launches.put(None)
        self._launcher.join()
        for waiter in self._waiters.values():
            waiter.close()
        for lane in self._host.values():
            lane.close()
        gc.unfreeze()

    def _serve(self) -> None:
        """Launch tasks in the order in which the core issued them."""
        torch.cuda.set_device(self._index)
        with torch.no_grad():
            self._take_workspace()
            while (work := self._launches.get()) is not None:
                try:
                    self._launch(work)
                except BaseException as error:  # the run fails by the task's name
                    self._post(Failed(work[0].run, error))

    def _take_workspace(self) -> None:
        """Let the allocator have the room for temporaries in one block, behind cuBLAS's workspace.

        Blocks taken as temporaries of other sizes come do not serve each other's, and together hold
        up to half as much again. cuBLAS's stays where it is for good, and would split the block.
        """
        # If even this fails, the first task says why.
        with suppress(RuntimeError), torch.cuda.stream(self._streams[Lane.COMPUTE]):
            one = torch.ones(1, 1, device=self._index, dtype=torch.bfloat16)
            torch.mm(one, one)
            torch.empty(self._workspace, device=self._index, dtype=torch.uint8)

    def _launch(self, work: Work) -> None:
        launch, operation, context = work
        run = launch.run
        stream = self._streams[run.task.lane]
        for earlier in launch.waits:
            event = self._events.get(earlier)
            if event is not None:  # else it has finished and been reported meanwhile
                stream.wait_event(event)
        started, stopped = _timed_event(), _timed_event()
        with torch.cuda.stream(stream):
            started.record(stream)
            operation(context)
            stopped.record(stream)
        self._events[run] = stopped
        self._waiters[run.task.lane].put(run, started, stopped)

    def _wait(self, run: TaskRun, started: torch.cuda.Event, stopped: torch.cuda.Event) -> None:
        """Until a stream task has ended; then post it with its times on the host's clock."""
        try:
            stopped.synchronize()
            begin = self._origin.elapsed_time(started) / 1e3 + self._origin_time
            end = self._origin.elapsed_time(stopped) / 1e3 + self._origin_time
            event: Event = Finished(run, begin, end)
        except BaseException as error:  # what a kernel did wrong shows when it is waited for
            event = Failed(run, error)
        self._events.pop(run, None)
        self._post(event)


class _Waiter:
    """Waits for the launched tasks of one stream lane, in order, without spinning."""

    def __init__(
        self, lane: Lane, wait: Callable[[TaskRun, torch.cuda.Event, torch.cuda.Event], None]
    ) -> None:
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._wait = wait
        self._thread = threading.Thread(
            target=self._serve, name=f"slideformer-wait-{lane}", daemon=True
        )
        self._thread.start()

    def put(self, run: TaskRun, started: torch.cuda.Event, stopped: torch.cuda.Event) -> None:
        """Add a launched task."""
        self._queue.put((run, started, stopped))

    def close(self) -> None:
        """End the thread."""
        self._queue.put(None)
        self._thread.join()

    def _serve(self) -> None:
        while (item := self._queue.get()) is not None:
            self._wait(*item)


def _timed_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True, blocking=True)
