"""Gradients that are not finite, put into steps of an engine."""

from __future__ import annotations

import math
from collections.abc import Collection
from itertools import count

import pytest
from torch import Tensor

from slideformer.graph.tasks import Task
from slideformer.models.context import StepContext
from slideformer.models.model_memory import Operation, Views
from slideformer.models.update_ops import UpdateOps

FINISH = UpdateOps.finish


def spoil(monkeypatch: pytest.MonkeyPatch, steps: Collection[int], value: float = math.nan) -> None:
    """Put a value into one element of a layer's gradient in these steps, counted from 0."""

    def spoiled(self: UpdateOps, task: Task, views: Views) -> Operation:
        operation = FINISH(self, task, views)
        if task.name != "finish.L01.c0":
            return operation
        flat: Tensor = views[task.reads[0]].view(self._memory.dtype)
        counter = count()

        def run(context: StepContext) -> object:
            if next(counter) in steps:
                flat[7] = value
            return operation(context)

        return run

    monkeypatch.setattr(UpdateOps, "finish", spoiled)
