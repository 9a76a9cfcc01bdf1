"""What the core decided in a real run, on threads, it decides again when told the same events."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slideformer.graph.graph import TaskGraph
from slideformer.graph.profile import MachineProfile
from slideformer.graph.tasks import Lane
from slideformer.runtime import scheduler as scheduler_module
from slideformer.runtime.core import Core
from slideformer.runtime.cpu import CpuDevice
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
)
from slideformer.runtime.scheduler import Scheduler
from tests.support.graphs import Machine, task_graphs
from tests.support.policies import AtRandom

PROFILE = MachineProfile()
WIDTHS = dict.fromkeys(Lane, 1) | PROFILE.widths


def told(instruction: Instruction) -> str:
    """An instruction in words."""
    match instruction:
        case Launch(run, waits):
            return f"launch {run!r} behind {waits!r}"
        case InstanceDone(instance):
            return f"done {instance.number}"
        case Stop(error):
            return f"stop: {error}"


class Recorder(Core):
    """A core that writes down what it is told and what it answers."""

    log: list[tuple[Any, list[str]]]

    def submit(self, graph: TaskGraph) -> tuple[Instance, list[Instruction]]:
        """Recorded as the graph."""
        instance, answer = super().submit(graph)
        self.log.append((graph, [told(i) for i in answer]))
        return instance, answer

    def handle(self, events: Sequence[Event]) -> list[Instruction]:
        """Recorded as instance, position and error of each."""
        answer = super().handle(events)
        facts = [
            (e.run.instance.number, e.run.position, e.error if isinstance(e, Failed) else None)
            for e in events
        ]
        self.log.append((facts, [told(i) for i in answer]))
        return answer


def record(graph: TaskGraph, policy: Policy, instances: int, fails: int | None) -> list[Any]:
    """Run on threads; the task at position ``fails`` of the last instance raises, if any."""
    log: list[Any] = []
    machine = Machine()

    def fail(_: Any) -> None:
        raise ZeroDivisionError("on purpose")

    async def run() -> None:
        scheduler = Scheduler(CpuDevice(WIDTHS), policy, PROFILE)
        done = []
        for number in range(instances):
            operations = machine.operations(graph)
            if fails is not None and number == instances - 1:
                operations[fails] = fail
            done.append(scheduler.submit(graph, operations, str(number)))
        await asyncio.gather(*done, return_exceptions=True)
        await scheduler.close()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recorder, "log", log, raising=False)
        patch.setattr(scheduler_module, "Core", Recorder)
        asyncio.run(run())
    return log


@settings(max_examples=40)
@given(task_graphs(), st.sampled_from([*policy_names(), "at-random"]), st.integers(1, 3), st.data())
def test_a_run_on_threads_replays_to_the_same_instructions(
    graph: TaskGraph, name: str, instances: int, data: st.DataObject
) -> None:
    def policy() -> Policy:
        return AtRandom(seed=7) if name == "at-random" else make_policy(name)

    positions = st.integers(0, len(graph.tasks) - 1)
    fails = data.draw(st.none() | positions) if graph.tasks else None
    log = record(graph, policy(), instances, fails)
    again = policy()
    again.prepare(graph, PROFILE)
    core = Core(again, PROFILE.widths, frozenset())
    replayed: list[Instance] = []
    for stimulus, answer in log:
        if isinstance(stimulus, TaskGraph):
            instance, instructions = core.submit(stimulus)
            replayed.append(instance)
        else:
            events: list[Event] = []
            for number, position, error in stimulus:
                run = replayed[number].runs[position]
                events.append(Failed(run, error) if error else Finished(run, 0.0, 0.0))
            instructions = core.handle(events)
        assert [told(i) for i in instructions] == answer
    launches = [line for _, answer in log for line in answer if line.startswith("launch")]
    assert fails is not None or len(launches) == instances * len(graph.tasks)
