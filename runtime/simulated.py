"""A device that computes nothing: tasks take the time that a machine profile predicts.

Its clock is virtual and jumps to the next finish, so simulating a step of minutes takes
milliseconds. The scheduler, the core and the policy are those of a real run.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from slideformer.graph.graph import TaskGraph
from slideformer.graph.plan import MachineProfile
from slideformer.graph.tasks import Lane
from slideformer.runtime.core import Event, Finished, Launch, TaskRun
from slideformer.runtime.device import Operation
from slideformer.runtime.policies import Policy
from slideformer.runtime.scheduler import Scheduler
from slideformer.runtime.trace import Timeline, Trace


class SimulatedDevice:
    """Lanes on a virtual clock, with the stream semantics of a GPU."""

    stream_lanes = frozenset({Lane.COMPUTE, Lane.H2D, Lane.D2H})

    def __init__(self, profile: MachineProfile) -> None:
        self._profile = profile
        self._clock = 0.0
        self._count = 0
        self._free = dict.fromkeys(self.stream_lanes, 0.0)
        self._stops: dict[TaskRun, float] = {}
        self._running: list[tuple[float, int, Finished]] = []
        self._scheduled = False

    def start(self, post: Callable[[Event], None]) -> None:
        """Remember where events go."""
        self._post = post
        self._loop = asyncio.get_running_loop()

    def launch(self, launches: Sequence[tuple[Launch, Operation, Any]]) -> None:
        """Compute each task's finish from its lane, its waits and its predicted duration."""
        for launch, _, _ in launches:
            run = launch.run
            begin = max([self._clock, *(self._stops[w] for w in launch.waits if w in self._stops)])
            if run.task.lane in self.stream_lanes:
                begin = max(begin, self._free[run.task.lane])
            stop = begin + self._profile.seconds(run.task)
            if run.task.lane in self.stream_lanes:
                self._free[run.task.lane] = stop
                self._stops[run] = stop
            heapq.heappush(self._running, (stop, self._count, Finished(run, begin, stop)))
            self._count += 1
        self._schedule()

    def _schedule(self) -> None:
        if self._running and not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._advance)

    def _advance(self) -> None:
        """Jump to the next finish."""
        self._scheduled = False
        self._clock, _, event = heapq.heappop(self._running)
        self._stops.pop(event.run, None)
        self._post(event)
        while self._running and self._running[0][0] == self._clock:
            _, _, event = heapq.heappop(self._running)
            self._stops.pop(event.run, None)
            self._post(event)
        if self._running:  # after the scheduler has seen these events
            self._loop.call_soon(self._schedule)

    def close(self) -> None:
        """Nothing to give up."""


def simulate(
    graph: TaskGraph, policy: Policy, profile: MachineProfile, instances: int = 1
) -> Timeline:
    """Run ``instances`` of ``graph`` one behind another on a virtual clock.

    Raises `PolicyError` for a policy that raises, idles or chooses what is not ready.
    """

    async def run() -> Timeline:
        trace = Trace(keep=instances)
        scheduler = Scheduler(SimulatedDevice(profile), policy, profile, trace)
        operations: list[Operation] = [lambda _: None] * len(graph.tasks)
        done = [scheduler.submit(graph, operations) for _ in range(instances)]
        await asyncio.gather(*done)
        await scheduler.close()
        return trace.timeline()

    # In a thread of its own: the caller's may have a running loop already, as in a notebook.
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: asyncio.run(run())).result()
