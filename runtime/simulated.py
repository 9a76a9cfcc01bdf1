"""A machine that computes nothing: tasks take the time that a machine profile predicts.

Its clock is virtual and jumps to the next finish, so simulating a step of minutes takes
milliseconds. The deciding core and the policy are those of a real run; only the asyncio shell
around them, which decides nothing, is left out.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from slideformer.graph.graph import TaskGraph
from slideformer.graph.plan import MachineProfile
from slideformer.graph.tasks import Lane
from slideformer.runtime.core import Core, Finished, Instruction, Launch, Stop, TaskRun
from slideformer.runtime.policies import Policy, prepare
from slideformer.runtime.trace import Timeline, Trace

STREAM_LANES = frozenset({Lane.COMPUTE, Lane.H2D, Lane.D2H})
"""Lanes with the stream semantics of a GPU."""


def simulate(
    graph: TaskGraph, policy: Policy, profile: MachineProfile, instances: int = 1
) -> Timeline:
    """Run ``instances`` of ``graph`` one behind another on a virtual clock.

    Raises `PolicyError` for a policy that raises, idles or chooses what is not ready.
    """
    prepare(policy, graph, profile)
    core = Core(policy, profile.widths, STREAM_LANES)
    machine, trace = _Machine(profile), Trace(keep=instances)
    for _ in range(instances):
        _, instructions = core.submit(graph)
        machine.carry_out(instructions)
    while events := machine.advance():
        for event in events:
            trace.record(event)
        machine.carry_out(core.handle(events))
    return trace.timeline()


class _Machine:
    """Lanes on a virtual clock."""

    def __init__(self, profile: MachineProfile) -> None:
        self._profile = profile
        self._clock = 0.0
        self._count = 0
        self._free = {
            lane: [0.0] * (1 if lane in STREAM_LANES else profile.widths.get(lane, 1))
            for lane in Lane
        }
        """When each of a lane's places is free again; heaps."""
        self._stops: dict[TaskRun, float] = {}
        self._running: list[tuple[float, int, Finished]] = []

    def carry_out(self, instructions: Sequence[Instruction]) -> None:
        """Start what is to start; raises what stops the run."""
        for instruction in instructions:
            match instruction:
                case Launch(run, waits):
                    self._start(run, waits)
                case Stop(error):
                    raise error

    def _start(self, run: TaskRun, waits: Sequence[TaskRun]) -> None:
        """A task begins when its lane has a place and what its stream waits for is done."""
        places = self._free[run.task.lane]
        begin = max(self._clock, places[0], *(self._stops.get(w, 0.0) for w in waits))
        stop = begin + self._profile.seconds(run.task)
        heapq.heapreplace(places, stop)
        self._stops[run] = stop
        heapq.heappush(self._running, (stop, self._count, Finished(run, begin, stop)))
        self._count += 1

    def advance(self) -> list[Finished]:
        """Jump to the next finish; all tasks that finish then, or none if nothing runs."""
        events: list[Finished] = []
        while self._running and (not events or self._running[0][0] == self._clock):
            self._clock, _, event = heapq.heappop(self._running)
            del self._stops[event.run]
            events.append(event)
        return events
