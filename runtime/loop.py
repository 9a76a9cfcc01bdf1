"""The scheduler in a thread of its own, for callers without an asyncio loop.

Nothing but decisions runs on that thread's loop, so a busy caller cannot delay them.
"""

from __future__ import annotations

import asyncio
import queue
import selectors
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from slideformer.graph.graph import TaskGraph
from slideformer.graph.profile import MachineProfile
from slideformer.runtime.device import Device, Operation
from slideformer.runtime.policies import Policy
from slideformer.runtime.scheduler import Scheduler
from slideformer.runtime.trace import Trace


class _Bell(selectors.DefaultSelector):
    """Waits for a ring, not for files, which a loop that only decides has none of."""

    def __init__(self) -> None:
        super().__init__()
        self._rings: queue.SimpleQueue[None] = queue.SimpleQueue()

    def ring(self) -> None:
        """End the wait; may be called from any thread."""
        self._rings.put(None)

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Nothing, once it rings or after ``timeout`` seconds."""
        if timeout is None or timeout > 0:
            with suppress(queue.Empty):
                self._rings.get(timeout=timeout)
        return []


class _Loop(asyncio.SelectorEventLoop):
    """An event loop that other threads wake by a bell.

    asyncio's own wakes by a byte through a socket: three calls of the kernel, each of which gives
    Python's lock away, where this takes one. An H100's host took 43 instead of 50 µs a task.
    """

    def __init__(self) -> None:
        bell = _Bell()
        super().__init__(bell)
        self._write_to_self = bell.ring


class SchedulerThread:
    """Submit instances of graphs from any thread; each submission returns a future."""

    def __init__(
        self,
        device: Device,
        policy: Policy,
        profile: MachineProfile | None = None,
        trace: Trace | None = None,
    ) -> None:
        self._loop = _Loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="slideformer-loop", daemon=True
        )
        self._thread.start()

        async def make() -> Scheduler:
            return Scheduler(device, policy, profile, trace)

        try:
            self._scheduler = asyncio.run_coroutine_threadsafe(make(), self._loop).result()
        except BaseException:
            self._end_loop()
            raise

    def submit(
        self, graph: TaskGraph, operations: Sequence[Operation], context: Any = None
    ) -> Future[None]:
        """Start an instance behind those submitted before; the future ends as the instance does.

        Raises `RuntimeError` after `close`.
        """
        if self._loop.is_closed():
            raise RuntimeError("the scheduler is closed")

        async def run() -> None:
            await self._scheduler.submit(graph, operations, context)

        return asyncio.run_coroutine_threadsafe(run(), self._loop)

    def cpu_seconds(self) -> float:
        """CPU seconds that its thread has taken so far."""
        assert self._thread.ident is not None
        return time.clock_gettime(time.pthread_getcpuclockid(self._thread.ident))

    def close(self) -> None:
        """Wait for everything in flight and end all threads; a second time does nothing."""
        if self._loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(self._scheduler.close(), self._loop).result()
        self._end_loop()

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
