"""What an NVMe store is to the tasks that move bytes to and from it."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any, Protocol

from slideformer.graph.buffers import Buffer, Tier
from slideformer.graph.tasks import Task
from slideformer.memory.extents import Extent
from slideformer.runtime.device import Binding, Memory, Operation, Views


class Store(Protocol):
    """Keeps extents; transfers run by themselves and end in a future, `asyncio.wrap_future`'s too.

    Memory is of the extent's size: page-aligned with the buffer protocol, or in GPU memory with
    ``__cuda_array_interface__``. Of one extent at most one transfer is under way at a time, which
    the edges of a graph see to.
    """

    def read(self, extent: Extent, into: Any) -> Future[None]:
        """Start filling ``into`` with an extent; it ends with `StoreError` if that fails."""

    def write(self, extent: Extent, source: Any) -> Future[None]:
        """Start writing an extent from ``source``; it ends with `StoreError` if that fails."""

    def close(self) -> None:
        """Wait for what is under way and give the space back."""


class TieredMemory:
    """Resolves buffers on NVMe to their extents and all others to memory."""

    def __init__(self, memory: Memory, extents: Mapping[str, Extent]) -> None:
        self._memory = memory
        self._extents = extents

    def view(self, buffer: Buffer) -> Any:
        """The extent, or the bytes, of ``buffer``."""
        if buffer.tier is Tier.NVME:
            return self._extents[buffer.place]
        return self._memory.view(buffer)


def transfer_bindings(store: Store) -> dict[str, Binding]:
    """Bindings of ``read_extents`` and ``write_extents``, whose reads and writes go in pairs."""

    def read(task: Task, views: Views) -> Operation:
        pairs = [
            (views[extent], _memory(views[target]))
            for extent, target in zip(task.reads, task.writes, strict=True)
        ]
        return lambda _: _wait([store.read(extent, target) for extent, target in pairs])

    def write(task: Task, views: Views) -> Operation:
        pairs = [
            (views[extent], _memory(views[source]))
            for source, extent in zip(task.reads, task.writes, strict=True)
        ]
        return lambda _: _wait([store.write(extent, source) for extent, source in pairs])

    return {"read_extents": read, "write_extents": write}


def _memory(view: Any) -> Any:
    """A tensor's memory as a store takes it."""
    return view if view.is_cuda else view.numpy().data


def _wait(transfers: list[Future[None]]) -> None:
    """Until all have ended: memory must not be given away while one of them still uses it."""
    errors = [each.exception() for each in transfers]
    for error in errors:
        if error is not None:
            raise error
