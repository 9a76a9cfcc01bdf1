"""Simulate a graph on a machine that need not be at hand, and read a timeline against its graph.

    timeline = sf.simulate(graph, "rtx4090", "critical-path")
    timeline.makespan, timeline.utilisation(), timeline.critical_path()

The scheduler and the policies are those of a real run; only the durations are predicted. A measured
timeline is read in the same way: ``GraphTimeline(engine.timeline().spans, graph=engine.graph)``.
Loads no torch.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, groupby

from slideformer.graph.analysis import next_instance_edges
from slideformer.graph.buffers import Buffer, Tier
from slideformer.graph.errors import ConfigError
from slideformer.graph.graph import TaskGraph
from slideformer.graph.machines import Machine, load_machine
from slideformer.graph.profile import MachineProfile
from slideformer.graph.tasks import Lane
from slideformer.runtime.policies import Policy, make_policy
from slideformer.runtime.policies import policy_names as policy_names
from slideformer.runtime.simulated import simulate as simulate_graph
from slideformer.runtime.trace import Span as Span
from slideformer.runtime.trace import Timeline

SCHEDULER = "scheduler"
"""Cause of idle time in which nothing that was waited for ran: the policy's choice, or overhead."""

Curve = list[tuple[float, int]]
"""Bytes from a time on, in seconds, in order of time."""


def simulate(
    graph: TaskGraph,
    machine: Machine | MachineProfile | str,
    policy: Policy | str = "earliest-deadline",
    instances: int = 1,
) -> GraphTimeline:
    """Run ``instances`` of ``graph`` one behind another on a virtual clock.

    ``machine`` and ``policy`` may be names. Raises `ConfigError` for an unknown name or a number of
    instances that cannot be, and `PolicyError` for a policy that raises, idles or chooses what is
    not ready.
    """
    check_instances(instances)
    known = load_machine(machine) if isinstance(machine, str) else machine
    profile = known.profile if isinstance(known, Machine) else known
    chosen = make_policy(policy) if isinstance(policy, str) else policy
    return GraphTimeline(simulate_graph(graph, chosen, profile, instances).spans, graph=graph)


def check_instances(instances: int) -> None:
    """Raise `ConfigError` unless it is a number of instances that can run."""
    if not isinstance(instances, int) or instances < 1:
        raise ConfigError(f"instances is {instances!r}; it must be a whole number of at least 1")


@dataclass(frozen=True, slots=True)
class Gap:
    """A lane's idle time before ``task``, in seconds on the timeline's clock.

    ``cause`` is the task that ``task`` waited for until last, or None if all that it waits for was
    done when the gap began.
    """

    start: float
    stop: float
    task: str
    cause: str | None


@dataclass
class GraphTimeline(Timeline):
    """A timeline of instances of one graph, and what follows from knowing both."""

    graph: TaskGraph = field(kw_only=True)

    def utilisation(self) -> dict[Lane, float]:
        """Share of the makespan in which at least one task of a lane ran, for each lane in use."""
        lanes = {task.lane: None for task in self.graph.tasks}
        return {lane: self.busy(lane) / (self.makespan or 1.0) for lane in lanes}

    def idle(self, lane: Lane) -> list[Gap]:
        """Idle times of a lane before and between its tasks, each with its cause."""
        found: list[Gap] = []
        reached = self.start
        for span in self.of_lane(lane):
            if span.started > reached:
                last = max(self.waited_for(span), key=_stopped, default=None)
                cause = last.task if last and last.stopped > reached else None
                found.append(Gap(reached, span.started, span.task, cause))
            reached = max(reached, span.stopped)
        return found

    def exposed(self, lane: Lane = Lane.COMPUTE, first: int = 0) -> dict[str, float]:
        """Idle seconds of a lane by what ran meanwhile on the way to its next task.

        Keys are kinds of tasks, or `SCHEDULER`. An update that holds up a copy that holds up the
        lane counts with its own share. Counted from the lane's last task before instance ``first``,
        so that a pipeline that is still filling can be left out.
        """
        causes: dict[str, float] = defaultdict(float)
        spans = self.of_lane(lane)
        reached = max((s.stopped for s in spans if s.instance < first), default=self.start)
        for span in spans:
            at = span.started
            for before in self._chain(span):
                if at <= reached:
                    break
                causes[SCHEDULER] += max(0.0, at - max(before.stopped, reached))
                start, stop = max(before.started, reached), min(before.stopped, at)
                if start < stop:
                    causes[self._kind(before)] += stop - start
                at = min(at, before.started)
            causes[SCHEDULER] += max(0.0, at - reached)
            reached = max(reached, span.stopped)
        return {cause: seconds for cause, seconds in causes.items() if seconds > 0}

    def critical_path(self) -> list[Span]:
        """What decided the makespan, first to last: each waited for the one before, or its lane."""
        if not self.spans:
            return []
        last = max(self.spans, key=_stopped)
        return [last, *self._chain(last)][::-1]

    def held(self, tier: Tier) -> Curve:
        """Bytes of a tier over time that no one else can use, by the ledger's rule.

        Slots and carried buffers are held throughout, others from first to last access.
        """
        own = [b for b in self.graph.buffers.values() if b.tier is tier and not b.slot]
        always = sum(s.nbytes for s in self.graph.slots.values() if s.tier is tier)
        return self._curve(own, always)

    def live(self, tier: Tier) -> Curve:
        """Bytes of a tier over time with contents still to be used, in slots or outside."""
        return self._curve([b for b in self.graph.buffers.values() if b.tier is tier], 0)

    def peaks(self) -> dict[Tier, int]:
        """Highest `held` of every tier in use."""
        used = {slot.tier for slot in self.graph.slots.values()}
        used |= {buffer.tier for buffer in self.graph.buffers.values()}
        return {tier: max(n for _, n in self.held(tier)) for tier in Tier if tier in used}

    def waited_for(self, span: Span) -> list[Span]:
        """The tasks that a task had to wait for, in its own instance and the one before."""
        at, spans = self.graph.index[span.task], self._by_place
        own = ((span.instance, p) for p in self.graph.edges.predecessors[at])
        earlier = ((span.instance - 1, p) for p in self._earlier.get(at, ()))
        return [spans[key] for key in (*own, *earlier) if key in spans]

    # -- inside ----------------------------------------------------------------------------------

    def _chain(self, span: Span) -> Iterator[Span]:
        """Backward from ``span``: what ended last of all that held it up, and so on."""
        seen, reached = {id(span)}, dict[Lane, int]()
        while True:
            blockers = [s for s in self.waited_for(span) if id(s) not in seen]
            blockers += self._before(span, seen, reached)
            if not blockers:
                return
            span = max(blockers, key=_stopped)
            seen.add(id(span))
            yield span

    def _before(self, span: Span, seen: set[int], reached: dict[Lane, int]) -> list[Span]:
        """The task of the same lane that ended last before ``span`` began, one not ``seen`` yet.

        ``reached`` counts the tasks of each lane that are left: all behind them are seen or late.
        """
        stops, spans = self._ends[span.lane]
        position = min(bisect_right(stops, span.started), reached.get(span.lane, len(spans)))
        while position and id(spans[position - 1]) in seen:  # tasks that took no time
            position -= 1
        reached[span.lane] = position
        return spans[position - 1 : position] if position else []

    def _kind(self, span: Span) -> str:
        return self.graph.tasks[self.graph.index[span.task]].kind.value

    @cached_property
    def _by_place(self) -> dict[tuple[int, int], Span]:
        return {(s.instance, self.graph.index[s.task]): s for s in self.spans}

    @cached_property
    def _earlier(self) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for before, after in next_instance_edges(self.graph):
            found.setdefault(after, []).append(before)
        return found

    @cached_property
    def _ends(self) -> dict[Lane, tuple[list[float], list[Span]]]:
        found = {}
        for lane in Lane:
            spans = sorted(self.of_lane(lane), key=_stopped)
            found[lane] = ([s.stopped for s in spans], spans)
        return found

    @cached_property
    def _instances(self) -> list[tuple[int, list[Span]]]:
        spans = sorted(self.spans, key=lambda s: s.instance)
        return [(n, list(group)) for n, group in groupby(spans, key=lambda s: s.instance)]

    @cached_property
    def _accesses(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for position, task in enumerate(self.graph.tasks):
            for name in dict.fromkeys((*task.reads, *task.writes)):
                found.setdefault(name, []).append(position)
        return found

    def _curve(self, buffers: Iterable[Buffer], always: int) -> Curve:
        changes: Counter[float] = Counter()
        for buffer in buffers:
            accesses = self._accesses.get(buffer.name, [])
            if buffer.carried:
                always += buffer.nbytes
                continue
            for number, _ in self._instances:
                places = ((number, p) for p in accesses)
                spans = [self._by_place[place] for place in places if place in self._by_place]
                if spans:
                    changes[min(s.started for s in spans)] += buffer.nbytes
                    changes[max(s.stopped for s in spans)] -= buffer.nbytes
        times = sorted({self.start, *changes})
        levels = accumulate((changes[t] for t in times), initial=always)
        next(levels)
        return list(zip(times, levels, strict=True))


def _stopped(span: Span) -> float:
    return span.stopped
