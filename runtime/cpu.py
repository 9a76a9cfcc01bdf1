"""A device of plain threads: every lane runs on host threads, "GPU" memory is host memory.

It runs the same graphs as the CUDA device, so everything but streams is tested without a GPU.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from slideformer.graph.tasks import Lane
from slideformer.runtime.device import Operation
from slideformer.runtime.runs import Event, Failed, Finished, Launch

Work = tuple[Launch, Operation, Any]


class LaneThreads:
    """One queue of tasks and the threads that run them; stops at `close`."""

    def __init__(self, name: str, width: int, post: Callable[[Event], None]) -> None:
        self._queue: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._post = post
        self._threads = [
            threading.Thread(target=self._serve, name=f"slideformer-{name}-{i}", daemon=True)
            for i in range(width)
        ]
        for thread in self._threads:
            thread.start()

    def put(self, work: Work) -> None:
        """Add a task."""
        self._queue.put(work)

    def close(self) -> None:
        """End the threads once the queue is empty."""
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()

    def _serve(self) -> None:
        while (work := self._queue.get()) is not None:
            launch, operation, context = work
            started = time.perf_counter()
            try:
                operation(context)
            except BaseException as error:  # whatever a task raises fails the run by its name
                self._post(Failed(launch.run, error))
            else:
                self._post(Finished(launch.run, started, time.perf_counter()))


class CpuDevice:
    """Runs each lane on its own threads (one, or the width asked for)."""

    stream_lanes: frozenset[Lane] = frozenset()

    def __init__(self, widths: dict[Lane, int] | None = None) -> None:
        self._widths = widths or {}
        self._lanes: dict[Lane, LaneThreads] = {}

    def start(self, post: Callable[[Event], None]) -> None:
        """Start the lanes' threads."""
        for lane in Lane:
            self._lanes[lane] = LaneThreads(lane, self._widths.get(lane, 1), post)

    def launch(self, launches: Sequence[Work]) -> None:
        """Queue tasks on their lanes."""
        for work in launches:
            self._lanes[work[0].run.task.lane].put(work)

    def close(self) -> None:
        """End the lanes' threads."""
        for lane in self._lanes.values():
            lane.close()
