"""Ranks of ready tasks, each computed when it is first asked for: a lane may have hundreds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from slideformer.runtime.runs import TaskRun

_Rank = TypeVar("_Rank", bound=Any)
"""Numbers, or tuples of them: what can be compared."""


class Ranks(dict[TaskRun, _Rank], Generic[_Rank]):
    """What ``rank`` says of each task, until the task is taken or its rank removed."""

    def __init__(self, rank: Callable[[TaskRun], _Rank]) -> None:
        self._rank = rank

    def __missing__(self, run: TaskRun) -> _Rank:
        rank = self[run] = self._rank(run)
        return rank

    def take(self, ready: Sequence[TaskRun]) -> TaskRun:
        """The task of lowest rank; of several, the first."""
        run = min(ready, key=self.__getitem__)
        del self[run]
        return run
