"""Runs of tasks and graphs, and what the deciding core and devices tell each other about them.

A task moves through these states:

    WAITING   some predecessor is not far enough; counted in `TaskRun.missing`
    READY     may start; listed in its lane's ready list until the policy takes it
    ISSUED    handed to the device; occupies one place of its lane
    DONE      finished; forgotten once its instance is

Events go to the core, instructions come from it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NamedTuple

from slideformer.graph.errors import SlideFormerError
from slideformer.graph.graph import TaskGraph
from slideformer.graph.tasks import Task


class State(Enum):
    """Where a task is; see the module's docstring."""

    WAITING = auto()
    READY = auto()
    ISSUED = auto()
    DONE = auto()


@dataclass(slots=True, eq=False)
class TaskRun:
    """One task of one instance. ``later`` are tasks of later instances that wait for it."""

    instance: Instance
    position: int
    task: Task
    missing: int
    streamed: bool = False  # whether its lane is a stream lane
    state: State = State.WAITING
    waits: list[TaskRun] = field(default_factory=list)
    later: list[TaskRun] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"{self.task.name}#{self.instance.number}"


@dataclass(slots=True, eq=False)
class Instance:
    """One run of a graph. ``unfinished`` counts its tasks that are not done."""

    number: int
    graph: TaskGraph
    runs: list[TaskRun] = field(default_factory=list)
    unfinished: int = 0


class Finished(NamedTuple):
    """Event: a task is done. Times are seconds on the device's clock."""

    run: TaskRun
    started: float
    stopped: float


@dataclass(frozen=True, slots=True)
class Failed:
    """Event: a task raised ``error``."""

    run: TaskRun
    error: BaseException


Event = Finished | Failed


class Launch(NamedTuple):
    """Instruction: start ``run``; on a stream lane, behind the unfinished tasks in ``waits``."""

    run: TaskRun
    waits: tuple[TaskRun, ...] = ()


@dataclass(frozen=True, slots=True)
class InstanceDone:
    """Instruction: every task of ``instance`` is done."""

    instance: Instance


@dataclass(frozen=True, slots=True)
class Stop:
    """Instruction: the run has failed and nothing is in flight any more."""

    error: SlideFormerError


Instruction = Launch | InstanceDone | Stop
