"""What deciding costs: a large graph through the real scheduler, with tasks that do nothing."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from slideformer.devices import make_lanes
from slideformer.graph.graph import TaskGraph
from slideformer.graph.plan import Compute, MemoryPlan
from slideformer.graph.profile import MachineProfile
from slideformer.graph.step import compile_step
from slideformer.models.shapes import shape_config
from slideformer.models.units import model_spec
from slideformer.runtime.loop import SchedulerThread
from slideformer.runtime.policies import make_policy, policy_names
from slideformer.runtime.trace import Trace


@dataclass(frozen=True, slots=True)
class Overhead:
    """Tasks of a run, its wall-clock seconds, and CPU seconds of the thread that decides."""

    tasks: int
    seconds: float
    loop_seconds: float

    @property
    def per_task(self) -> float:
        """CPU seconds of the deciding thread for each task."""
        return self.loop_seconds / self.tasks


def large_step() -> TaskGraph:
    """A step of a 123-billion-parameter model in eight micro-batches: more than 5,000 tasks."""
    spec = model_spec(shape_config("mistral-large-123b"))
    plan = MemoryPlan(
        compute=Compute.BF16,
        rows=32,
        seq_len=1024,
        micro_rows=4,
        vocab_chunks=1,
        head_tile=4096,
        window=3,
        chunk_numel=-(-spec.layers[0].numel // 8),
        offloaded=len(spec.layers),
        staging_slots=8,
    )
    return compile_step(spec, plan)


def scheduler_overhead(
    graph: TaskGraph, device: torch.device, instances: int
) -> dict[str, Overhead]:
    """By policy: ``instances`` of ``graph`` with tasks that do nothing, after one more.

    At most two are open at a time, as in training.
    """
    return {name: _run(graph, device, name, instances) for name in policy_names()}


def _run(graph: TaskGraph, device: torch.device, policy: str, instances: int) -> Overhead:
    scheduler = SchedulerThread(make_lanes(device), make_policy(policy), MachineProfile(), Trace())
    operations = [_nothing] * len(graph.tasks)
    try:
        scheduler.submit(graph, operations).result()  # ranks the tasks
        started, before = time.perf_counter(), scheduler.cpu_seconds()
        last = scheduler.submit(graph, operations)
        for _ in range(instances - 1):
            following = scheduler.submit(graph, operations)
            last.result()
            last = following
        last.result()
        return Overhead(
            instances * len(graph.tasks),
            time.perf_counter() - started,
            scheduler.cpu_seconds() - before,
        )
    finally:
        scheduler.close()


def _nothing(context: object) -> None:
    pass
