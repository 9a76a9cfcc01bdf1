"""The engine as a contestant of the benchmark: runs in a process of its own.

Measures speed in the steady state: the next step is always submitted before the one before is done.
"""

from __future__ import annotations

import dataclasses
import gc
import time
from typing import Any

import numpy as np
import torch

from slideformer.config import EngineConfig
from slideformer.engine import Engine
from slideformer.graph.buffers import Tier, host_bytes
from slideformer.graph.graph import TaskGraph
from slideformer.graph.plan import MemoryPlan
from slideformer.measuring.trial import (
    array_batches,
    memory,
    random_batches,
    shape_config,
    torch_device,
)
from slideformer.phantom import phantom_layers, spared_nbytes
from slideformer.traces import write_trace


class Ours:
    """One engine on one shape; answers the requests of a benchmark."""

    def __init__(self) -> None:
        self._engine: Engine | None = None
        self._step_ends: list[float] = []

    def hello(self, device: str, gpu_cap: int | None = None) -> dict[str, Any]:
        """Make the context on the device, and say which it is.

        ``gpu_cap`` bounds the GPU memory that this process reserves, in bytes.
        """
        self._device = torch_device(device)
        if self._device.type == "cuda" and gpu_cap is not None:
            total = torch.cuda.get_device_properties(self._device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, gpu_cap / total))
        name = torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else None
        return {"device": self._device.type, "gpu": name, **memory(self._device)}

    def build(
        self, shape: str | None, settings: dict[str, Any], *, phantom: bool = False
    ) -> dict[str, Any]:
        """Make the engine, with random weights unless ``shape`` is None; returns its plan.

        ``phantom`` is that of `Engine`; the host memory it spares is not counted as planned.
        """
        started = time.perf_counter()
        initial = shape_config(shape) if shape is not None else None
        config = EngineConfig(**{"model": "random", **settings, "device": self._device.type})
        self._engine = engine = Engine(config, initial=initial, phantom=phantom)
        spec = engine.spec
        plan = engine.plan
        layers = phantom_layers(spec, plan) if phantom else {}
        spared = spared_nbytes(spec, layers, plan.compute, plan.optimizer)
        self._batches = random_batches(spec.vocab, config.step_rows, config.seq_len, 4)
        return {
            "build_seconds": time.perf_counter() - started,
            "parameters": spec.param_count,
            "layers": len(spec.layers),
            "hidden": spec.hidden,
            "plan": plan_facts(plan, spared),
            "traffic": traffic(engine.graph),
        }

    def run(self, steps: int, warmup: int) -> dict[str, Any]:
        """Seconds per step over ``steps`` steps after ``warmup`` steps, and the memory they took.

        One step more follows, which is not counted: the last counted step shares the machine with
        the one after it, as all others do.
        """
        assert self._engine is not None
        ends = [time.perf_counter()]
        previous = None
        for number in range(warmup + steps + 1):
            handle = self._engine.step(self._batches[number % len(self._batches)])
            if previous is not None:
                previous.wait()
                ends.append(time.perf_counter())
            previous = handle
        self._engine.synchronize()
        self._step_ends = ends[warmup:]
        seconds = (ends[-1] - ends[warmup]) / max(steps, 1)
        return {
            "step_seconds": seconds,
            "each": [b - a for a, b in zip(self._step_ends, self._step_ends[1:], strict=False)],
            **memory(self._device),
        }

    def losses(self, tokens: str, lr: float) -> list[float]:
        """Train once on each batch of a .npy file int64 [steps, B, S]; the loss of each."""
        assert self._engine is not None
        handles = [self._engine.step(b, lr=lr) for b in array_batches(np.load(tokens))]
        return [handle.loss() for handle in handles]

    def trace(self, folder: str) -> None:
        """Write the step's graph, and when the tasks of the last steps ran, into ``folder``."""
        assert self._engine is not None
        write_trace(folder, self._engine.graph, self._engine.timeline())

    def release(self) -> None:
        """Give the engine's memory back; `build` makes another one."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None
            gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def plan_facts(plan: MemoryPlan, spared: int = 0) -> dict[str, Any]:
    """The plan's plain numbers, and its predicted peaks in bytes, less ``spared`` on the host."""
    facts = {
        field.name: value
        for field in dataclasses.fields(plan)
        if isinstance(value := getattr(plan, field.name), int | float | str)
    }
    return {
        **facts,
        "resident": sorted(plan.resident),
        "gpu_peak": plan.peaks[Tier.GPU],
        "host_peak": host_bytes(plan.peaks) - spared,
    }


def traffic(graph: TaskGraph) -> dict[str, dict[str, float]]:
    """Tasks, bytes, FLOPs and updated parameters of a step, per lane."""
    found: dict[str, dict[str, float]] = {}
    for task in graph.tasks:
        lane = found.setdefault(str(task.lane), {"tasks": 0, "nbytes": 0, "flops": 0, "params": 0})
        lane["tasks"] += 1
        lane["nbytes"] += task.cost.nbytes
        lane["flops"] += task.cost.total_flops
        lane["params"] += task.cost.params
    return found
