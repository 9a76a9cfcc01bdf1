"""The scheduler in a thread of its own, for callers without an asyncio loop.

Nothing but decisions runs on that thread's loop, so a busy caller cannot delay them.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from slideformer.graph.graph import TaskGraph
from slideformer.graph.profile import MachineProfile
from slideformer.runtime.device import Device, Operation
from slideformer.runtime.policies import Policy
from slideformer.runtime.scheduler import Scheduler
from slideformer.runtime.trace import Trace


class SchedulerThread:
    """Submit instances of graphs from any thread; each submission returns a future."""

    def __init__(
        self,
        device: Device,
        policy: Policy,
        profile: MachineProfile | None = None,
        trace: Trace | None = None,
    ) -> None:
        self._loop = asyncio.new_event_loop()
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
