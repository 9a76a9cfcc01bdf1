"""The CUDA device where CUDA fails, with stand-ins for what only a GPU has.

What works is tested on a GPU, through the engine.
"""

from __future__ import annotations

import asyncio
from contextlib import nullcontext

import pytest
import torch

from slideformer.graph.builder import GraphBuilder
from slideformer.graph.errors import TaskError
from slideformer.graph.tasks import STREAM_LANES, TaskKind
from slideformer.runtime import cuda
from slideformer.runtime.cuda import CudaDevice
from slideformer.runtime.policies import make_policy
from slideformer.runtime.scheduler import Scheduler


class BrokenEvent:
    """An event behind a kernel that did something wrong, but for the first one, behind none."""

    made = 0

    def __init__(self, **_: bool) -> None:
        self.number = BrokenEvent.made
        BrokenEvent.made += 1

    def record(self, stream: object) -> None:
        """Nothing to record."""

    def synchronize(self) -> None:
        """Say what the kernel did."""
        if self.number:
            raise RuntimeError("CUDA error: device-side assert triggered")


def test_a_kernel_that_fails_after_its_launch_fails_the_run_by_its_task(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(BrokenEvent, "made", 0)
    monkeypatch.setattr(torch.cuda, "Event", BrokenEvent)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(cuda, "_streams", lambda _: dict.fromkeys(STREAM_LANES))
    monkeypatch.setattr(CudaDevice, "_take_workspace", lambda _: None)
    builder = GraphBuilder()
    builder.task("fwd.L00", TaskKind.COMPUTE)
    graph = builder.build()

    async def run() -> None:
        scheduler = Scheduler(CudaDevice(0), make_policy("fifo"))
        done = scheduler.submit(graph, [lambda _: None])
        with pytest.raises(TaskError, match=r"fwd\.L00#0 failed: RuntimeError: CUDA error: device"):
            await asyncio.wait_for(done, 10)
        await scheduler.close()

    asyncio.run(run())
