"""The asyncio shell around the deciding core: carries events in and instructions out.

The loop only decides. Work runs on the device's threads and streams; their events arrive through
one queue and wake the loop once however many they are.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Any

from slideformer.graph.errors import GraphError, PolicyError, SlideFormerError, shown
from slideformer.graph.graph import TaskGraph
from slideformer.graph.profile import MachineProfile
from slideformer.runtime.core import Core
from slideformer.runtime.device import Device, Operation
from slideformer.runtime.policies import Policy, name_of, prepare
from slideformer.runtime.runs import (
    Event,
    Finished,
    Instance,
    InstanceDone,
    Instruction,
    Launch,
    Stop,
)
from slideformer.runtime.trace import Trace


class Scheduler:
    """Runs instances of graphs on a device; use inside a running asyncio loop.

    Instances overlap: each waits only for the tasks of earlier ones that touch the same bytes.
    """

    def __init__(
        self,
        device: Device,
        policy: Policy,
        profile: MachineProfile | None = None,
        trace: Trace | None = None,
    ) -> None:
        self._device = device
        self._policy = policy
        self._profile = profile or MachineProfile()
        self._trace = trace
        self._core = Core(policy, self._profile.widths, device.stream_lanes)
        self._loop = asyncio.get_running_loop()
        self._events: deque[Event] = deque()
        self._woken = False
        self._prepared: dict[int, TaskGraph] = {}  # by id, which is the graph's while it lives
        self._work: dict[int, tuple[Sequence[Operation], Any]] = {}
        self._done: dict[int, asyncio.Future[None]] = {}
        self._error: SlideFormerError | None = None
        device.start(self._post)

    def submit(
        self, graph: TaskGraph, operations: Sequence[Operation], context: Any = None
    ) -> asyncio.Future[None]:
        """Start an instance; the future ends with it, or with the error that failed the run.

        Every operation of the instance is called with ``context``. Raises `GraphError` if there is
        not one operation per task, `PolicyError` if the policy cannot prepare for the graph, and
        what failed the run if it has failed.
        """
        if self._error is not None:
            raise self._error
        if len(operations) != len(graph.tasks):
            raise GraphError(
                f"graph {graph.name!r} has {len(graph.tasks)} tasks, but {len(operations)} "
                "operation(s) are given; give one per task, as `bind` makes them"
            )
        self._prepare(graph)
        future: asyncio.Future[None] = self._loop.create_future()
        future.add_done_callback(_told)
        try:
            instance, instructions = self._core.submit(graph)
            self._done[instance.number] = future
            self._work[instance.number] = (operations, context)
            self._carry_out(instructions)
        except Exception as error:  # of any type: a policy may have changed what it was shown
            raise self._broken(error) from error
        done = asyncio.shield(future)  # who gives up waiting does not end the instance
        done.add_done_callback(_told)
        return done

    def _prepare(self, graph: TaskGraph) -> None:
        if id(graph) in self._prepared:
            return
        prepare(self._policy, graph, self._profile)
        self._prepared[id(graph)] = graph

    async def close(self) -> None:
        """Wait for everything in flight, then stop the device's threads."""
        pending = list(self._done.values())
        if pending:
            await asyncio.gather(*pending, return_exceptions=True)
        self._device.close()

    def _post(self, event: Event) -> None:
        """Take an event from any thread."""
        self._events.append(event)
        if not self._woken:
            self._woken = True
            self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        try:
            self._take_events()
        except Exception as error:  # of any type: a policy may have changed what it was shown
            self._broken(error).__cause__ = error
        self._woken = False
        if self._events and not self._woken:  # came after the last look
            self._woken = True
            self._loop.call_soon(self._wake)

    def _take_events(self) -> None:
        while self._events:
            events: list[Event] = []
            while self._events:
                events.append(self._events.popleft())
            if self._trace is not None:
                for event in events:
                    if isinstance(event, Finished):
                        self._trace.record(event)
            if self._error is None:  # else what it would start now rests on a broken state
                self._carry_out(self._core.handle(events))

    def _broken(self, error: Exception) -> SlideFormerError:
        """Fail the run, which would wait for ever, after a change to what a policy was shown.

        Or after a mistake of ours; returns what failed it.
        """
        failed = PolicyError(
            f"scheduling by policy {name_of(self._policy)} broke: {type(error).__name__}: "
            f"{shown(error, str)}"
        )
        self._fail(failed)
        return failed

    def _carry_out(self, instructions: Sequence[Instruction]) -> None:
        launches: list[tuple[Launch, Operation, Any]] = []
        for instruction in instructions:
            match instruction:
                case Launch(run):
                    operations, context = self._work[run.instance.number]
                    launches.append((instruction, operations[run.position], context))
                case InstanceDone(instance):
                    self._finish(instance)
                case Stop(error):
                    self._fail(error)
        if launches:
            self._device.launch(launches)

    def _finish(self, instance: Instance) -> None:
        del self._work[instance.number]
        self._done.pop(instance.number).set_result(None)

    def _fail(self, error: SlideFormerError) -> None:
        self._error = error
        for future in self._done.values():
            future.set_exception(error)
        self._done.clear()
        self._work.clear()


def _told(done: asyncio.Future[None]) -> None:
    """Look at an error that nobody may wait for: what failed the run is told by `submit`, too."""
    if not done.cancelled():
        done.exception()
