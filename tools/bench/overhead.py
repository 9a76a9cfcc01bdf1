"""``slideformer bench --scheduler``: CPU seconds of the deciding thread per task, by policy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

MOST_PER_TASK = 50e-6
"""CPU seconds that deciding may take per task."""

_STEPS = 3


def decision_costs(device: str) -> dict[str, Any]:
    """Run a step of thousands of tasks that do nothing, under every policy."""
    from slideformer.measuring.overhead import large_step, scheduler_overhead
    from slideformer.measuring.trial import torch_device

    where, graph = torch_device(device), large_step()
    policies = {
        name: {**asdict(cost), "per_task": cost.per_task}
        for name, cost in scheduler_overhead(graph, where, _STEPS).items()
    }
    passed = all(each["per_task"] <= MOST_PER_TASK for each in policies.values())
    return {
        "device": where.type,
        "tasks": len(graph.tasks),
        "steps": _STEPS,
        "policies": policies,
        "passed": passed,
    }


def overhead_report(found: Mapping[str, Any]) -> Iterator[str]:
    """Lines for reading."""
    yield (
        f"scheduler on {found['device']}: {found['tasks']:,} tasks that do nothing, "
        f"{found['steps']} steps"
    )
    for name, each in found["policies"].items():
        wall = each["seconds"] / (found["steps"] * found["tasks"])
        yield (
            f"  {name:<18} {each['per_task'] * 1e6:5.1f} µs of the deciding thread's CPU per task "
            f"(at most {MOST_PER_TASK * 1e6:.0f}), {wall * 1e6:.0f} µs of time"
        )
