"""A machine that computes nothing: tasks take the time that a machine profile predicts.

Its clock is virtual and jumps to the next finish, so simulating a step of minutes takes
milliseconds. The deciding core and the policy are those of a real run; only the asyncio shell
around them, which decides nothing, is left out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter

from slideformer.graph.graph import TaskGraph
from slideformer.graph.profile import MachineProfile
from slideformer.graph.tasks import STREAM_LANES, Lane
from slideformer.runtime.core import Core
from slideformer.runtime.policies import Policy, prepare
from slideformer.runtime.runs import Finished, Instruction, Launch, Stop, TaskRun
from slideformer.runtime.trace import Timeline, Trace


def simulate(
    graph: TaskGraph, policy: Policy, profile: MachineProfile, instances: int = 1
) -> Timeline:
    """Run ``instances`` of ``graph`` one behind another on a virtual clock.

    Raises `PolicyError` for a policy that raises, idles or chooses what is not ready.
    """
    prepare(policy, graph, profile)
    core = Core(policy, profile.widths, STREAM_LANES)
    machine, trace = _Machine(graph, profile), Trace(keep=instances)
    for _ in range(instances):
        _, instructions = core.submit(graph)
        machine.carry_out(instructions)
    while events := machine.advance():
        for event in events:
            trace.record(event)
        machine.carry_out(core.handle(events))
    return trace.timeline()


@dataclass(slots=True, eq=False)
class _Running:
    """A task at work. ``stop`` is when it ends if it keeps its ``speed``; ``order`` breaks ties."""

    stop: float
    order: int
    run: TaskRun
    lane: Lane
    begin: float
    speed: float


_end = attrgetter("stop", "order")


class _Machine:
    """Lanes on a virtual clock, which slow each other down as the profile says."""

    def __init__(self, graph: TaskGraph, profile: MachineProfile) -> None:
        self._profile = profile
        self._seconds = [profile.seconds(task) for task in graph.tasks]
        self._clock = 0.0
        self._count = 0
        self._places = {
            lane: 1 if lane in STREAM_LANES else profile.widths.get(lane, 1) for lane in Lane
        }
        self._queues: dict[Lane, deque[tuple[int, TaskRun, Sequence[TaskRun]]]] = {
            lane: deque() for lane in Lane
        }
        self._running: list[_Running] = []
        self._changed = False
        """Whether other tasks are at work than when speeds were last looked at."""
        self._issued: set[TaskRun] = set()
        """Tasks that are queued or at work."""
        self._speeds: dict[frozenset[Lane], dict[Lane, float]] = {}

    def carry_out(self, instructions: Sequence[Instruction]) -> None:
        """Start what is to start; raises what stops the run."""
        for instruction in instructions:
            if isinstance(instruction, Launch):
                run, waits = instruction
                self._queues[run.task.lane].append((self._count, run, waits))
                self._issued.add(run)
                self._count += 1
            elif isinstance(instruction, Stop):
                raise instruction.error

    def advance(self) -> list[Finished]:
        """Jump to the next finish; all tasks that finish then, or none if nothing runs."""
        events: list[Finished] = []
        while True:
            self._begin()
            if not self._running:
                return events
            first = min(self._running, key=_end)
            if events and first.stop > self._clock:
                return events
            self._clock = first.stop
            self._running.remove(first)
            self._changed = True
            self._issued.remove(first.run)
            self._places[first.lane] += 1
            events.append(Finished(first.run, first.begin, first.stop))

    def _begin(self) -> None:
        """Begin what its lane has a place for and whose stream waits for nothing any more."""
        for lane, queue in self._queues.items():
            while queue and self._places[lane]:
                order, run, waits = queue[0]
                if waits and not self._issued.isdisjoint(waits):
                    break
                queue.popleft()
                self._places[lane] -= 1
                stop = self._clock + self._seconds[run.position]
                self._running.append(_Running(stop, order, run, lane, self._clock, 1.0))
                self._changed = True
        if self._changed:
            self._change_speeds()
            self._changed = False

    def _change_speeds(self) -> None:
        busy = frozenset([each.lane for each in self._running])
        speeds = self._speeds.get(busy)
        if speeds is None:
            speeds = {lane: self._profile.speed(lane, busy) for lane in busy}
            self._speeds[busy] = speeds
        for each in self._running:
            speed = speeds[each.lane]
            if speed != each.speed:
                each.stop = self._clock + (each.stop - self._clock) * each.speed / speed
                each.speed = speed
