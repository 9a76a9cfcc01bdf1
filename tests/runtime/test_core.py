"""The deciding core, driven by a device that does everything late and in a strange order."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slideformer.graph.buffers import Tier
from slideformer.graph.builder import GraphBuilder
from slideformer.graph.errors import GraphError, NonFiniteError, PolicyError, TaskError
from slideformer.graph.graph import TaskGraph
from slideformer.graph.profile import MachineProfile
from slideformer.graph.tasks import STREAM_LANES, Lane, TaskKind
from slideformer.runtime.core import STREAM_DEPTH, Core
from slideformer.runtime.policies import Policy, make_policy, policy_names
from slideformer.runtime.runs import (
    Event,
    Failed,
    Finished,
    Instance,
    InstanceDone,
    Instruction,
    Launch,
    Stop,
    TaskRun,
)
from tests.support.graphs import Machine, conflicts, run_sequentially, task_graphs


@dataclass
class Device:
    """What a core asked for. A stream runs its tasks in order, each behind its waits."""

    streams: frozenset[Lane]
    queues: dict[Lane, deque[Launch]] = field(
        default_factory=lambda: {lane: deque() for lane in Lane}
    )
    running: list[TaskRun] = field(default_factory=list)
    finished: list[TaskRun] = field(default_factory=list)
    unreported: list[TaskRun] = field(default_factory=list)

    def startable(self) -> list[Launch]:
        """Launched tasks that nothing on the device holds up."""
        found = []
        for lane, queue in self.queues.items():
            if lane not in self.streams:
                found += list(queue)
            elif queue and not any(run.task.lane is lane for run in self.running):
                head = queue[0]
                if all(run in self.finished for run in head.waits):
                    found.append(head)
        return found

    def start(self, launch: Launch) -> None:
        """A launched task begins."""
        self.queues[launch.run.task.lane].remove(launch)
        self.running.append(launch.run)

    def finish(self, run: TaskRun) -> None:
        """A running task ends; the core does not know yet."""
        self.running.remove(run)
        self.finished.append(run)
        self.unreported.append(run)

    def busy(self, lane: Lane) -> int:
        """Tasks of a lane that the core must take for unfinished."""
        runs = [*(w.run for w in self.queues[lane]), *self.running, *self.unreported]
        return sum(run.task.lane is lane for run in runs)


@dataclass
class Run:
    """A core under test with its device, and everything that passed between them."""

    policy: Policy
    programs: Sequence[TaskGraph]
    widths: Mapping[Lane, int]
    streams: frozenset[Lane]
    log: list[tuple[object, list[str]]] = field(default_factory=list)
    done: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.core = Core(self.policy, self.widths, self.streams)
        self.device = Device(self.streams)
        self.machine = Machine()
        self.first: list[int] = []
        self.before: dict[int, list[int]] = {}
        for earlier, later in conflicts(self.programs):
            self.before.setdefault(later, []).append(earlier)
        self.started: set[int] = set()
        self.ended: set[int] = set()

    def number(self, run: TaskRun) -> int:
        """Position of a task in the sequence of all programs."""
        return sum(len(g.tasks) for g in self.programs[: run.instance.number]) + run.position

    def take(self, stimulus: object, instructions: list[Instruction]) -> None:
        """Carry instructions out and check the core."""
        self.log.append((stimulus, [show(i) for i in instructions]))
        for instruction in instructions:
            if isinstance(instruction, Launch):
                self.device.queues[instruction.run.task.lane].append(instruction)
            elif isinstance(instruction, InstanceDone):
                self.done.append(instruction.instance.number)
            else:
                pytest.fail(f"nothing went wrong, but {show(instruction)}")
        self.core.validate()
        for lane in Lane:
            limit = STREAM_DEPTH[lane] if lane in self.streams else self.widths.get(lane, 1)
            assert self.device.busy(lane) <= limit

    def go(self, rng: random.Random) -> None:
        """Submit all programs and finish everything, at random."""
        for graph in self.programs:
            self.policy.prepare(graph, MachineProfile())
        waiting = list(range(len(self.programs)))
        while True:
            moves: list[str] = []
            startable = self.device.startable()
            moves += ["submit"] * bool(waiting) + ["start"] * bool(startable)
            moves += ["finish"] * bool(self.device.running)
            moves += ["report"] * bool(self.device.unreported)
            if not moves:
                break
            move = rng.choice(moves)
            if move == "submit":
                index = waiting.pop(0)
                _, instructions = self.core.submit(self.programs[index])
                self.take(("submit", index), instructions)
            elif move == "start":
                self.start(rng.choice(startable))
            elif move == "finish":
                run = rng.choice(self.device.running)
                self.device.finish(run)
                self.ended.add(self.number(run))
            else:
                count = rng.randint(1, len(self.device.unreported))
                runs = rng.sample(self.device.unreported, count)
                for run in runs:
                    self.device.unreported.remove(run)
                events: list[Event] = [Finished(run, 0.0, 1.0) for run in runs]
                names = tuple((run.instance.number, run.position) for run in runs)
                self.take(("report", names), self.core.handle(events))

    def start(self, launch: Launch) -> None:
        """Begin a task, which nothing it conflicts with may precede or overlap."""
        number = self.number(launch.run)
        assert number not in self.started, "a task runs once"
        unfinished = [p for p in self.before.get(number, ()) if p not in self.ended]
        assert not unfinished, f"{launch.run!r} begins before {unfinished} ended"
        self.started.add(number)
        self.device.start(launch)
        graph = self.programs[launch.run.instance.number]
        self.machine.operation(graph, launch.run.task)(str(launch.run.instance.number))


def show(instruction: Instruction) -> str:
    """An instruction in words, for comparison."""
    match instruction:
        case Launch(run, waits):
            return f"launch {run!r} behind {waits!r}"
        case InstanceDone(instance):
            return f"done {instance.number}"
        case Stop(error):
            return f"stop {error}"


class Whimsical:
    """Chooses at random and often idles, but not when nothing is in flight."""

    name = "whimsical"

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self.in_flight = lambda: True

    def prepare(self, graph: TaskGraph, profile: MachineProfile) -> None:
        """Nothing."""

    def choose(self, lane: Lane, ready: Sequence[TaskRun]) -> TaskRun | None:
        """Any, or none."""
        if self.in_flight() and self._rng.random() < 0.3:
            return None
        return self._rng.choice(ready)


@st.composite
def runs(draw: st.DrawFn) -> Run:
    """Several programs over common places, and a core to run them."""
    graphs = draw(st.lists(task_graphs(max_tasks=9), min_size=1, max_size=3))
    order = draw(st.lists(st.integers(0, len(graphs) - 1), min_size=1, max_size=4))
    widths = draw(st.dictionaries(st.sampled_from(Lane), st.integers(1, 3)))
    streams = draw(st.sampled_from([frozenset(), STREAM_LANES]))
    name = draw(st.sampled_from([*policy_names(), "whimsical"]))
    policy: Policy
    seed = draw(st.integers(0, 1000))
    policy = Whimsical(seed) if name == "whimsical" else make_policy(name)
    run = Run(policy, [graphs[i] for i in order], widths, streams)
    if isinstance(policy, Whimsical):
        policy.in_flight = lambda: any(run.device.busy(lane) for lane in Lane)
    return run


@settings(max_examples=150)
@given(runs(), st.integers(0, 10**6))
def test_everything_runs_once_in_a_safe_order_to_the_sequential_result(run: Run, seed: int) -> None:
    run.go(random.Random(seed))
    assert sorted(run.done) == list(range(len(run.programs)))
    assert len(run.started) == sum(len(graph.tasks) for graph in run.programs)
    expected = run_sequentially(run.programs)
    assert run.machine.seen == expected.seen
    assert run.machine.memory == expected.memory


@settings(max_examples=60)
@given(runs(), st.integers(0, 10**6))
def test_a_recorded_run_replays_to_the_same_instructions(run: Run, seed: int) -> None:
    if isinstance(run.policy, Whimsical):
        run.policy = make_policy("fifo")
        run.core = Core(run.policy, run.widths, run.streams)
    run.go(random.Random(seed))
    policy = make_policy(run.policy.name)
    for graph in run.programs:
        policy.prepare(graph, MachineProfile())
    core = Core(policy, run.widths, run.streams)
    instances: list[Instance] = []
    for stimulus, recorded in run.log:
        match stimulus:
            case ("submit", int(index)):
                instance, instructions = core.submit(run.programs[index])
                instances.append(instance)
            case ("report", names):
                found = [instances[number].runs[position] for number, position in names]
                instructions = core.handle([Finished(r, 0.0, 1.0) for r in found])
        assert [show(i) for i in instructions] == recorded


def chain(*kinds: TaskKind) -> TaskGraph:
    """Tasks ``t0.x``, ``t1.x``, … one behind another."""
    builder = GraphBuilder("chain")
    for number, kind in enumerate(kinds):
        builder.task(f"t{number}.x", kind, after=[f"t{number - 1}.x"] if number else [])
    return builder.build()


def free(*kinds: TaskKind) -> TaskGraph:
    """Tasks ``t0.x``, ``t1.x``, … that do not wait for each other."""
    builder = GraphBuilder("free")
    for number, kind in enumerate(kinds):
        builder.task(f"t{number}.x", kind)
    return builder.build()


def launched(instructions: Sequence[Instruction]) -> list[str]:
    """Names of the tasks that instructions start."""
    return [i.run.task.name for i in instructions if isinstance(i, Launch)]


def test_a_stream_task_is_issued_behind_its_producer_on_another_stream() -> None:
    core = Core(make_policy("fifo"), stream_lanes=STREAM_LANES)
    _, instructions = core.submit(chain(TaskKind.H2D, TaskKind.COMPUTE, TaskKind.D2H))
    assert [show(i) for i in instructions] == [
        "launch t0.x#0 behind ()",
        "launch t1.x#0 behind (t0.x#0,)",
        "launch t2.x#0 behind (t1.x#0,)",
    ]


def test_a_host_task_waits_until_its_stream_producer_has_finished() -> None:
    core = Core(make_policy("fifo"), stream_lanes=STREAM_LANES)
    instance, instructions = core.submit(chain(TaskKind.D2H, TaskKind.CPU, TaskKind.H2D))
    assert launched(instructions) == ["t0.x"]
    instructions = core.handle([Finished(instance.runs[0], 0.0, 1.0)])
    assert launched(instructions) == ["t1.x"]
    instructions = core.handle([Finished(instance.runs[1], 0.0, 1.0)])
    assert [show(i) for i in instructions] == ["launch t2.x#0 behind ()"]


def test_without_streams_every_task_waits_for_the_finish() -> None:
    core = Core(make_policy("fifo"))
    instance, instructions = core.submit(chain(TaskKind.H2D, TaskKind.COMPUTE))
    assert launched(instructions) == ["t0.x"]
    assert launched(core.handle([Finished(instance.runs[0], 0.0, 1.0)])) == ["t1.x"]


def test_tasks_of_one_stream_need_no_event_between_them() -> None:
    core = Core(make_policy("fifo"), stream_lanes=STREAM_LANES)
    _, instructions = core.submit(chain(TaskKind.COMPUTE, TaskKind.COMPUTE))
    assert [show(i) for i in instructions] == [
        "launch t0.x#0 behind ()",
        "launch t1.x#0 behind ()",
    ]


def test_a_lane_takes_as_many_as_it_is_wide_and_a_stream_a_few() -> None:
    kinds = [TaskKind.CPU] * 4 + [TaskKind.COMPUTE] * 4 + [TaskKind.H2D] * 3 + [TaskKind.SAVE] * 2
    core = Core(make_policy("fifo"), {Lane.CPU: 3, Lane.COMPUTE: 9, Lane.H2D: 9}, STREAM_LANES)
    instance, instructions = core.submit(free(*kinds))
    compute, copies, updates = ["t4.x", "t5.x", "t6.x"], ["t8.x", "t9.x"], ["t0.x", "t1.x", "t2.x"]
    assert launched(instructions) == [*compute, *copies, *updates, "t11.x"]
    more = core.handle([Finished(instance.runs[i], 0.0, 1.0) for i in (1, 4, 8, 11)])
    assert launched(more) == ["t7.x", "t10.x", "t3.x", "t12.x"]


def test_the_next_instance_waits_for_the_bytes_it_touches_and_nothing_else() -> None:
    builder = GraphBuilder()
    for name, kind in (("a", TaskKind.CPU), ("b", TaskKind.SAVE)):
        buffer = builder.buffer(name, 4, Tier.CPU, carried=True)
        target = builder.buffer("disk", 4, Tier.NVME) if kind is TaskKind.SAVE else buffer
        builder.task(f"use.{name}", kind, reads=[buffer], writes=[target])
    graph = builder.build()
    core = Core(make_policy("fifo"), {Lane.CPU: 2, Lane.NVME_WRITE: 2})
    first, instructions = core.submit(graph)
    assert launched(instructions) == ["use.a", "use.b"]
    _, instructions = core.submit(graph)
    assert launched(instructions) == []
    instructions = core.handle([Finished(first.runs[1], 0.0, 1.0)])
    assert [show(i) for i in instructions] == ["launch use.b#1 behind ()"]


def test_an_empty_graph_is_done_at_once() -> None:
    core = Core(make_policy("fifo"))
    instance, instructions = core.submit(TaskGraph("empty", (), {}, {}))
    assert instructions == [InstanceDone(instance)]
    core.validate()


def test_a_write_waits_for_readers_of_all_instances_since_the_last_write() -> None:
    builder = GraphBuilder("read")
    shared = builder.buffer("shared", 4, Tier.CPU, carried=True)
    builder.task("read.x", TaskKind.CPU, reads=[shared])
    reader = builder.build()
    builder = GraphBuilder("write")
    builder.buffer("shared", 4, Tier.CPU, carried=True)
    builder.task("write.x", TaskKind.NVME_READ, writes=["shared"])
    writer = builder.build()
    core = Core(make_policy("fifo"), {Lane.CPU: 3, Lane.NVME_READ: 1})
    readers = [core.submit(reader)[0].runs[0] for _ in range(3)]
    assert core.submit(writer)[1] == []
    assert core.handle([Finished(readers[1], 0.0, 1.0), Finished(readers[2], 0.0, 1.0)])
    assert launched(core.handle([Finished(readers[0], 0.0, 1.0)])) == ["write.x"]


def test_a_launch_is_not_told_to_wait_for_what_has_finished() -> None:
    builder = GraphBuilder()
    up = builder.buffer("up", 4, Tier.GPU)
    for number in range(3):
        builder.task(f"t{number}.x", TaskKind.COMPUTE)
    builder.task("h2d.x", TaskKind.H2D, writes=[up])
    builder.task("use.x", TaskKind.COMPUTE, reads=[up])
    core = Core(make_policy("fifo"), stream_lanes=STREAM_LANES)
    instance, instructions = core.submit(builder.build())
    assert launched(instructions) == ["t0.x", "t1.x", "t2.x", "h2d.x"]
    assert core.handle([Finished(instance.runs[3], 0.0, 1.0)]) == []
    (launch,) = core.handle([Finished(instance.runs[0], 0.0, 1.0)])
    assert show(launch) == "launch use.x#0 behind ()"


def test_a_stream_task_waits_for_a_ready_one_of_an_earlier_instance_to_be_issued() -> None:
    builder = GraphBuilder()
    up = builder.buffer("up", 4, Tier.GPU)
    for number in range(3):
        builder.task(f"t{number}.x", TaskKind.H2D, writes=[up] if number == 2 else [])
    first = builder.build()
    builder = GraphBuilder()
    builder.buffer("up", 4, Tier.GPU)
    builder.task("use.x", TaskKind.COMPUTE, writes=["up"])
    core = Core(make_policy("fifo"), stream_lanes=STREAM_LANES)
    instance, instructions = core.submit(first)
    assert launched(instructions) == ["t0.x", "t1.x"]
    assert core.submit(builder.build())[1] == [], "t2.x is ready, but its stream is full"
    instructions = core.handle([Finished(instance.runs[0], 0.0, 1.0)])
    assert [show(i) for i in instructions] == [
        "launch t2.x#0 behind ()",
        "launch use.x#1 behind (t2.x#0,)",
    ]


# Failures


def test_a_failure_stops_the_run_when_nothing_is_in_flight_any_more() -> None:
    core = Core(make_policy("fifo"), {Lane.CPU: 2})
    instance, _ = core.submit(free(*[TaskKind.CPU] * 5))
    assert launched(core.handle([Finished(instance.runs[0], 0.0, 1.0)])) == ["t2.x"]
    cause = ValueError("too large")
    assert core.handle([Failed(instance.runs[1], cause)]) == []
    _, instructions = core.submit(free(TaskKind.SAVE))
    assert instructions == [], "nothing starts after a failure"
    (stop,) = core.handle([Finished(instance.runs[2], 0.0, 1.0)])
    assert isinstance(stop, Stop)
    assert isinstance(stop.error, TaskError)
    assert stop.error.__cause__ is cause
    message = str(stop.error)
    assert message.startswith("t1.x#0 failed: ValueError: too large")
    assert "t0.x#0 finished" in message, "it tells what happened before"
    assert core.handle([]) == [], "it stops once"


def test_the_first_of_several_failures_is_told() -> None:
    core = Core(make_policy("fifo"), {Lane.CPU: 2})
    instance, _ = core.submit(free(*[TaskKind.CPU] * 2))
    events = [Failed(instance.runs[i], RuntimeError(f"number {i}")) for i in (1, 0)]
    (stop,) = core.handle(events)
    assert isinstance(stop, Stop)
    assert "t1.x#0" in str(stop.error)


def test_an_error_for_the_user_keeps_its_class_and_gets_the_name() -> None:
    core = Core(make_policy("fifo"))
    instance, _ = core.submit(free(TaskKind.CPU))
    (stop,) = core.handle([Failed(instance.runs[0], NonFiniteError("the gradient is infinite"))])
    assert isinstance(stop, Stop)
    assert type(stop.error) is NonFiniteError
    assert str(stop.error) == "t0.x#0: the gradient is infinite"


class Broken:
    """A policy that breaks its contract in one of several ways."""

    name = "broken"

    def __init__(self, how: str) -> None:
        self._how = how
        self._taken: TaskRun | None = None

    def prepare(self, graph: TaskGraph, profile: MachineProfile) -> None:
        """Nothing."""

    def choose(self, lane: Lane, ready: Sequence[TaskRun]) -> TaskRun | None:
        """Break the contract."""
        match self._how:
            case "idles":
                return None
            case "raises":
                raise RuntimeError("no idea")
            case "repeats":
                self._taken = self._taken or ready[0]
                return self._taken
            case "takes":
                assert isinstance(ready, list)
                taken: TaskRun = ready.pop()
                return taken
            case _:
                return ready[0].task  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("idles", "leaves every lane idle although 3 task(s) are ready: t0.x#0, t1.x#0, t2.x#0"),
        ("raises", "raised RuntimeError('no idea') on lane cpu"),
        ("repeats", "chose t0.x#0 on lane cpu, not ready; ready: t1.x#0"),
        ("foreign", "on lane cpu, not ready; ready: t0.x#0"),
        ("takes", "chose t2.x#0 on lane cpu, not ready"),
    ],
)
def test_a_policy_that_breaks_its_contract_is_named(how: str, words: str) -> None:
    core = Core(Broken(how), {Lane.CPU: 2})
    instance, instructions = core.submit(free(*[TaskKind.CPU] * 3))
    if how == "repeats":  # the first choice was fine
        assert launched(instructions) == ["t0.x"]
        instructions = core.handle([Finished(instance.runs[0], 0.0, 1.0)])
    (stop,) = instructions
    assert isinstance(stop, Stop)
    assert isinstance(stop.error, PolicyError)
    assert "policy 'broken'" in str(stop.error)
    assert words in str(stop.error)


def test_nothing_starts_after_a_policy_has_broken_its_contract() -> None:
    class OnComputeOnly(Broken):
        def choose(self, lane: Lane, ready: Sequence[TaskRun]) -> TaskRun | None:
            if lane is Lane.COMPUTE:
                raise RuntimeError("no idea")
            return ready[0]

    core = Core(OnComputeOnly("none"))
    _, (stop,) = core.submit(free(TaskKind.CPU, TaskKind.COMPUTE, TaskKind.SAVE))
    assert isinstance(stop, Stop)


def test_a_policy_may_idle_while_something_is_in_flight() -> None:
    class OneAtATime(Broken):
        def choose(self, lane: Lane, ready: Sequence[TaskRun]) -> TaskRun | None:
            return ready[0] if lane is Lane.CPU else None

    core = Core(OneAtATime("none"))
    instance, instructions = core.submit(free(TaskKind.SAVE, TaskKind.CPU))
    assert launched(instructions) == ["t1.x"]
    (stop,) = core.handle([Finished(instance.runs[1], 0.0, 1.0)])
    assert isinstance(stop, Stop), "now nothing is in flight"


def test_a_graph_with_an_unknown_buffer_leaves_the_core_as_it_was() -> None:
    core = Core(make_policy("fifo"))
    broken = TaskGraph("g", chain(TaskKind.CPU).tasks, {}, {})
    lost = TaskGraph("g", (broken.tasks[0].__class__("a.b", TaskKind.CPU, "a", ("gone",)),), {}, {})
    with pytest.raises(GraphError):
        core.submit(lost)
    core.validate()
    _, instructions = core.submit(broken)
    assert launched(instructions) == ["t0.x"]


def test_waits_for_earlier_instances_are_in_program_order() -> None:
    """Not in that of a set, which differs from run to run."""
    builder = GraphBuilder()
    kinds = (TaskKind.H2D, TaskKind.D2H, TaskKind.H2D, TaskKind.D2H)
    shared = builder.buffer("shared", 4, Tier.GPU, carried=True)
    names = []
    for number, kind in enumerate(kinds):
        name = builder.buffer(f"b{number}", 4, Tier.CPU if kind is TaskKind.D2H else Tier.GPU)
        reads = [shared] if kind is TaskKind.D2H else []
        names.append(builder.task(f"t{number}.x", kind, reads=reads, writes=[name]))
    producers = builder.build()
    builder = GraphBuilder()
    for number in (0, 2):
        builder.buffer(f"b{number}", 4, Tier.GPU)
    builder.buffer("shared", 4, Tier.GPU, carried=True)
    builder.task("use.x", TaskKind.COMPUTE, writes=["b2", "shared", "b0"])
    consumer = builder.build()
    kept = []
    for _ in range(50):  # each time with objects elsewhere in memory
        kept.append([object() for _ in range(random.Random(len(kept)).randint(0, 99))])
        core = Core(make_policy("fifo"), stream_lanes=STREAM_LANES)
        _, instructions = core.submit(producers)
        assert len(launched(instructions)) == 4
        _, (launch,) = core.submit(consumer)
        assert show(launch) == "launch use.x#1 behind (t0.x#0, t1.x#0, t2.x#0, t3.x#0)"
        kept.append([core])
