"""What a device is to the scheduler, and what an operation is to a device.

Devices carry out instructions of the deciding core: ``cpu.py`` on threads, ``cuda.py`` on streams,
``simulated.py`` on a virtual clock.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from slideformer.graph.buffers import Buffer
from slideformer.graph.errors import GraphError
from slideformer.graph.graph import TaskGraph
from slideformer.graph.tasks import Lane, Task
from slideformer.runtime.runs import Event, Launch

Operation = Callable[[Any], object]
"""What a task does when it runs; takes the instance's context."""

Views = Mapping[str, Any]
"""Buffer name → its memory, one-dimensional bytes."""

Binding = Callable[[Task, Views], Operation]
"""Makes the operation of a task, once per graph. ``Views`` hold what the task reads and writes."""


class Memory(Protocol):
    """Resolves buffers to memory."""

    def view(self, buffer: Buffer) -> Any:
        """The bytes of ``buffer``."""


class Device(Protocol):
    """Where lanes run."""

    stream_lanes: frozenset[Lane]
    """Lanes whose tasks are ordered among each other by the device itself."""

    def start(self, post: Callable[[Event], None]) -> None:
        """Get ready; ``post`` may be called from any thread."""

    def launch(self, launches: Sequence[tuple[Launch, Operation, Any]]) -> None:
        """Start tasks, each with its operation and context; returns at once."""

    def close(self) -> None:
        """Give up all threads; nothing is in flight."""


def bind(graph: TaskGraph, bindings: Mapping[str, Binding], memory: Memory) -> list[Operation]:
    """The operation of every task of ``graph``; raises `GraphError` for an op without binding."""
    operations: list[Operation] = []
    for task in graph.tasks:
        if task.op not in bindings:
            raise GraphError(
                f"task {task.name}: op {task.op!r} has no binding; bound: "
                f"{', '.join(sorted(bindings)) or 'none'}"
            )
        names = dict.fromkeys((*task.reads, *task.writes))
        views = {name: memory.view(graph.buffers[name]) for name in names}
        operations.append(bindings[task.op](task, views))
    return operations
