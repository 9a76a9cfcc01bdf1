"""The deciding core of the scheduler: events in, instructions out, nothing else.

It has no clock, thread, device or random number, so a recorded sequence of events replays to the
same instructions. The asyncio shell around it is ``scheduler.py``; devices carry out instructions.
Events and instructions are in ``runs.py``, with the states that a task moves through.

Ordering (`stream lanes` are lanes whose tasks run in order on a device stream of their own):

    stream lane → stream lane   the consumer may be issued once the producer is issued; the device
                                makes the consumer's stream wait (`Launch.waits`)
    everything else             the consumer may be issued once the producer has finished
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

from slideformer.graph.errors import PolicyError, SlideFormerError, shown, task_error
from slideformer.graph.graph import TaskGraph
from slideformer.graph.hazards import HazardMap
from slideformer.graph.tasks import Lane
from slideformer.runtime.policies import Policy, choice, name_of
from slideformer.runtime.runs import (
    Event,
    Failed,
    Instance,
    InstanceDone,
    Instruction,
    Launch,
    State,
    Stop,
    TaskRun,
)

STREAM_DEPTH = {Lane.COMPUTE: 3, Lane.H2D: 2, Lane.D2H: 2}
"""Unfinished tasks per stream lane: one runs, one is queued, the rest are the policy's.

Two are queued for computing: the cast of a layer's gradients is over before the next layer's
backward could be decided on and launched.
"""


class Core:
    """Decides what starts next. `submit` and `handle` are its only two ways in."""

    def __init__(
        self,
        policy: Policy,
        widths: Mapping[Lane, int] | None = None,
        stream_lanes: frozenset[Lane] = frozenset(),
    ) -> None:
        self._policy = policy
        self._streams = stream_lanes
        self._limit = {
            lane: STREAM_DEPTH[lane] if lane in stream_lanes else (widths or {}).get(lane, 1)
            for lane in Lane
        }
        self._ready: dict[Lane, list[TaskRun]] = {lane: [] for lane in Lane}
        self._in_flight: dict[Lane, int] = dict.fromkeys(Lane, 0)
        self._frontier: HazardMap[TaskRun] = HazardMap()
        self._instances = 0
        self._open: list[Instance] = []
        self._error: SlideFormerError | None = None
        self._stopped = False
        self._story: deque[tuple[str, int]] = deque(maxlen=5)
        """The last tasks that finished, and their instances."""

    # -- ways in ---------------------------------------------------------------------------------

    def submit(self, graph: TaskGraph) -> tuple[Instance, list[Instruction]]:
        """Start another instance of a graph behind all that were submitted before.

        Tasks wait only for those earlier tasks that touch the same bytes.
        """
        instance = Instance(self._instances, graph, unfinished=len(graph.tasks))
        self._instances += 1
        instance.runs = [
            TaskRun(instance, position, task, missing, task.lane in self._streams)
            for position, (task, missing) in enumerate(
                zip(graph.tasks, graph.direct.predecessors, strict=True)
            )
        ]
        self._open.append(instance)
        self._join_frontier(instance)
        for run in instance.runs:
            if run.missing == 0:
                self._make_ready(run)
        if not instance.runs:
            self._open.remove(instance)
            return instance, [InstanceDone(instance)]
        return instance, self._dispatch()

    def handle(self, events: Sequence[Event]) -> list[Instruction]:
        """Take note of what happened and decide what happens next."""
        instructions: list[Instruction] = []
        for event in events:
            run = event.run
            self._in_flight[run.task.lane] -= 1
            if isinstance(event, Failed):
                self._fail(task_error(repr(run), event.error, self._story))
                continue
            run.state = State.DONE
            self._story.append((run.task.name, run.instance.number))
            self._release(run, issued=False)
            instance = run.instance
            instance.unfinished -= 1
            if instance.unfinished == 0:
                self._open.remove(instance)
                instance.runs = []  # no cycles: their memory goes without Python's collector
                instructions.append(InstanceDone(instance))
        instructions += self._dispatch()
        return instructions

    # -- edges -----------------------------------------------------------------------------------

    def _join_frontier(self, instance: Instance) -> None:
        """Edges from earlier instances, then leave this instance's own marks."""
        waits: dict[int, set[TaskRun]] = {}
        for entry in instance.graph.edges.entries:
            for segment in self._frontier.cut(entry.place, entry.start, entry.stop):
                earlier = waits.setdefault(entry.task, set())
                if segment.writer is not None:
                    earlier.add(segment.writer)
                if entry.write:
                    earlier.update(segment.readers)
        for position, earlier in waits.items():
            run = instance.runs[position]
            for pred in sorted(earlier, key=_program_order):  # a set's order differs between runs
                self._wait_for(run, pred)
        for leave in instance.graph.edges.exits:
            readers = [instance.runs[r] for r in leave.readers]
            for segment in self._frontier.cut(leave.place, leave.start, leave.stop):
                if leave.writer is None:
                    alive = [r for r in segment.readers if r.state is not State.DONE]
                    segment.readers = alive + readers
                else:
                    segment.writer = instance.runs[leave.writer]
                    segment.readers = list(readers)

    def _wait_for(self, run: TaskRun, pred: TaskRun) -> None:
        """Make ``run`` wait for a task of an earlier instance that has not gone far enough yet."""
        if pred.state is State.DONE:
            return
        if run.streamed and pred.streamed and pred.state is State.ISSUED:
            run.waits.append(pred)
            return
        run.missing += 1
        pred.later.append(run)

    def _release(self, run: TaskRun, *, issued: bool) -> None:
        """Tell the tasks that wait for ``run`` that it is issued, or done."""
        runs, streamed = run.instance.runs, run.streamed
        own = [runs[position] for position in run.instance.graph.direct.successors[run.position]]
        for successor in own + run.later:
            # Between streams the issue counts, for all others the end.
            if (streamed and successor.streamed) is not issued:
                continue
            if issued:
                successor.waits.append(run)
            successor.missing -= 1
            if successor.missing == 0:
                self._make_ready(successor)
        if not issued:
            run.later.clear()
            run.waits.clear()

    def _make_ready(self, run: TaskRun) -> None:
        run.state = State.READY
        self._ready[run.task.lane].append(run)

    # -- choosing --------------------------------------------------------------------------------

    def _dispatch(self) -> list[Instruction]:
        instructions: list[Instruction] = []
        progress = True
        while progress and self._error is None:
            progress = False
            for lane, ready in self._ready.items():
                while ready and self._in_flight[lane] < self._limit[lane] and self._error is None:
                    run = self._choose(lane, ready)
                    if run is None:
                        break
                    instructions.append(self._issue(run))
                    progress |= run.streamed  # others may be ready now
        if not any(self._in_flight.values()):
            self._check_stuck()
            if self._error is not None and not self._stopped:
                self._stopped = True
                instructions.append(Stop(self._error))
        return instructions

    def _choose(self, lane: Lane, ready: list[TaskRun]) -> TaskRun | None:
        try:
            run = choice(self._policy, lane, ready)
        except PolicyError as error:
            self._fail(error)
            return None
        if run is None:
            return None
        # A policy has the list in hand, so being in it is not enough.
        known = isinstance(run, TaskRun) and run.state is State.READY and run.task.lane is lane
        if not known or run not in ready:
            names = ", ".join(map(repr, ready[:8]))
            self._fail(
                PolicyError(
                    f"policy {name_of(self._policy)} chose {shown(run)} on lane {lane}, not ready; "
                    f"ready: {names}"
                )
            )
            return None
        ready.remove(run)
        return run

    def _issue(self, run: TaskRun) -> Launch:
        lane = run.task.lane
        run.state = State.ISSUED
        self._in_flight[lane] += 1
        waits = tuple(
            [w for w in run.waits if w.state is not State.DONE and w.task.lane is not lane]
        )
        if run.streamed:
            self._release(run, issued=True)
        return Launch(run, waits)

    def _check_stuck(self) -> None:
        if self._error is None and self._open:
            ready = [run for runs in self._ready.values() for run in runs]
            names = ", ".join(map(repr, ready[:8]))
            self._fail(
                PolicyError(
                    f"policy {name_of(self._policy)} leaves every lane idle although "
                    f"{len(ready)} task(s) are ready: {names}"
                )
            )

    def _fail(self, error: SlideFormerError) -> None:
        if self._error is None:
            self._error = error

    # -- for tests -------------------------------------------------------------------------------

    def validate(self) -> None:
        """Check every count against every task; raises `AssertionError` on a mistake of ours."""
        for lane, ready in self._ready.items():
            assert all(r.state is State.READY and r.missing == 0 for r in ready)
            assert all(r.task.lane is lane for r in ready)
            assert 0 <= self._in_flight[lane] <= self._limit[lane]
        issued = [r for i in self._open for r in i.runs if r.state is State.ISSUED]
        if self._error is None:
            assert len(issued) == sum(self._in_flight.values())
        for instance in self._open:
            done = sum(r.state is State.DONE for r in instance.runs)
            assert instance.unfinished == len(instance.runs) - done


def _program_order(run: TaskRun) -> tuple[int, int]:
    return run.instance.number, run.position
