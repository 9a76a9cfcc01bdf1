"""Policies that only tests use."""

from __future__ import annotations

import random
from collections.abc import Sequence

from slideformer.graph.graph import TaskGraph
from slideformer.graph.profile import MachineProfile
from slideformer.graph.tasks import Lane
from slideformer.runtime.runs import TaskRun


class AtRandom:
    """Takes any ready task; of two with the same seed, the same ones."""

    name = "at-random"

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def prepare(self, graph: TaskGraph, profile: MachineProfile) -> None:
        """Nothing to prepare."""

    def choose(self, lane: Lane, ready: Sequence[TaskRun]) -> TaskRun | None:
        """Any."""
        return self._random.choice(ready)
