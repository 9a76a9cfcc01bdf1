"""Scheduling policies: which ready task a lane takes next.

Any order is safe in a planned graph, so a policy decides speed and nothing else. Third-party
policies load through the entry-point group ``slideformer.policies``.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points
from typing import Protocol

from slideformer.graph.analysis import due_times, tails
from slideformer.graph.errors import ConfigError, PolicyError, shown
from slideformer.graph.graph import TaskGraph
from slideformer.graph.profile import MachineProfile
from slideformer.graph.tasks import Lane
from slideformer.runtime.memory_aware import MemoryAware
from slideformer.runtime.ranks import Ranks
from slideformer.runtime.runs import TaskRun


class Policy(Protocol):
    """Chooses from a lane's ready tasks."""

    name: str

    def prepare(self, graph: TaskGraph, profile: MachineProfile) -> None:
        """Called once for each graph before its first instance is submitted."""

    def choose(self, lane: Lane, ready: Sequence[TaskRun]) -> TaskRun | None:
        """The task that ``lane`` takes now, or None to leave it idle until something finishes.

        ``ready`` is not empty and in the order in which its tasks became ready.
        """


class Fifo:
    """Takes tasks in the order in which they became ready."""

    name = "fifo"

    def prepare(self, graph: TaskGraph, profile: MachineProfile) -> None:
        """Nothing to prepare."""

    def choose(self, lane: Lane, ready: Sequence[TaskRun]) -> TaskRun | None:
        """The first."""
        return ready[0]


class _Ranked(ABC):
    """Takes the task of lowest rank; ranks are computed once per graph."""

    name = ""

    def __init__(self) -> None:
        self._of_graph: dict[int, tuple[TaskGraph, list[float]]] = {}  # by id of the graph
        self._ranks = Ranks(self._rank)

    def prepare(self, graph: TaskGraph, profile: MachineProfile) -> None:
        """Rank every task of ``graph``."""
        self._of_graph[id(graph)] = graph, self.rank(graph, profile)

    @abstractmethod
    def rank(self, graph: TaskGraph, profile: MachineProfile) -> list[float]:
        """One number per task, in steps: a task of the next instance ranks one higher."""

    def choose(self, lane: Lane, ready: Sequence[TaskRun]) -> TaskRun | None:
        """The task of lowest rank; of several, the one ready first."""
        return self._ranks.take(ready)

    def _rank(self, run: TaskRun) -> float:
        _, ranks = self._of_graph[id(run.instance.graph)]
        return run.instance.number + ranks[run.position]


class CriticalPath(_Ranked):
    """Prefers the task with the longest path behind it in its own step."""

    name = "critical-path"

    def rank(self, graph: TaskGraph, profile: MachineProfile) -> list[float]:
        """Shares of the step's critical path that are already behind the task."""
        longest = tails(graph, profile)
        whole = max(longest, default=1.0) or 1.0
        return [1.0 - tail / whole for tail in longest]


class EarliestDeadline(_Ranked):
    """Prefers the task whose result is needed first, in this step or the next (Jackson 1955)."""

    name = "earliest-deadline"

    def rank(self, graph: TaskGraph, profile: MachineProfile) -> list[float]:
        """Latest starts that keep the compute lane busy."""
        return due_times(graph, profile)


_POLICIES: dict[str, Callable[[], Policy]] = {
    "fifo": Fifo,
    "critical-path": CriticalPath,
    "earliest-deadline": EarliestDeadline,
    "memory-aware": MemoryAware,
}


def policy_names() -> list[str]:
    """Names of all policies that can be chosen."""
    return sorted({*_POLICIES, *(e.name for e in entry_points(group="slideformer.policies"))})


def make_policy(name: str) -> Policy:
    """A fresh policy by name.

    Raises `ConfigError` with the nearest known name, and `PolicyError` for one of another package
    that cannot be loaded or is no policy.
    """
    if name in _POLICIES:
        return _POLICIES[name]()
    for entry in entry_points(group="slideformer.policies"):
        if entry.name == name:
            return _load(entry)
    near = get_close_matches(name, policy_names(), n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(f"unknown policy {name!r}; {hint}known: {', '.join(policy_names())}")


def prepare(policy: Policy, graph: TaskGraph, profile: MachineProfile) -> None:
    """Let ``policy`` prepare for a graph; raises `PolicyError` if it cannot."""
    try:
        policy.prepare(graph, profile)
    except BaseException as error:
        if _is_ctrl_c(error):
            raise
        raise PolicyError(
            f"policy {name_of(policy)} raised {shown(error)} when it prepared for graph "
            f"{graph.name!r}"
        ) from error


def choice(policy: Policy, lane: Lane, ready: Sequence[TaskRun]) -> object:
    """What ``policy`` chooses, whatever it is; raises `PolicyError` if it raises."""
    try:
        return policy.choose(lane, ready)
    except BaseException as error:
        if _is_ctrl_c(error):
            raise
        raise PolicyError(
            f"policy {name_of(policy)} raised {shown(error)} on lane {lane}"
        ) from error


def _is_ctrl_c(error: BaseException) -> bool:
    """Whether the user interrupted a policy, which Python tells the main thread alone."""
    main = threading.current_thread() is threading.main_thread()
    return main and isinstance(error, KeyboardInterrupt)


def name_of(policy: Policy) -> str:
    """A policy's name for messages, even of an object that is none."""
    return shown(policy, lambda each: repr(getattr(each, "name", type(each).__name__)))


def _load(entry: EntryPoint) -> Policy:
    """The policy of another package."""
    try:
        policy: Policy = entry.load()()
    except (Exception, SystemExit) as error:  # anything may be wrong with somebody else's package
        raise PolicyError(
            f"policy {entry.name!r} cannot be loaded from {entry.value!r}: "
            f"{type(error).__name__}: {shown(error, str)}"
        ) from error
    lacking = [part for part in ("name", "prepare", "choose") if not hasattr(policy, part)]
    if lacking:
        raise PolicyError(
            f"policy {entry.name!r}, which is {entry.value!r}, lacks {', '.join(lacking)}; "
            "see docs/policies.md"
        )
    return policy
