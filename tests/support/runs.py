"""A run's folder, as training leaves it, with made-up figures."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from slideformer.config import Config, save_config
from slideformer.graph.step import compile_step
from slideformer.simulation import simulate
from slideformer.traces import write_trace
from tests.support.specs import small_plan, small_spec


def metrics_of(steps: int) -> list[dict[str, Any]]:
    """Lines of a metrics file: a loss that falls, one step that was skipped, two evaluations."""
    lines: list[dict[str, Any]] = [
        {
            "step": step,
            "loss": 4 * math.exp(-step / 20),
            "gradient_norm": 1 / step,
            "lr": 1e-4 * step,
            "tokens": 1000,
            "seconds": 0.5,
            "skipped": False,
        }
        for step in range(1, steps + 1)
    ]
    lines[1].update(loss=None, gradient_norm=None, skipped=True)
    for line in (lines[0], lines[-1]):
        line["validation_loss"] = line["loss"] + 1
    return lines


def write_run(folder: Path, steps: int = 30, **settings: Any) -> Path:
    """A folder with metrics, settings, plan, and a traced step."""
    folder.mkdir()
    lines = "".join(json.dumps(line) + "\n" for line in metrics_of(steps))
    (folder / "metrics.jsonl").write_text(lines)
    plan = {
        "version": 1,
        "window": 3,
        "deferred": False,
        "workspace": 3 << 20,
        "peaks": {"gpu": 3 << 30},
        "resident": ["head"],
    }
    (folder / "plan.json").write_text(json.dumps(plan))
    given = {"model": "m", "data": "<b>.jsonl", "output": folder, "lr": 3e-4, **settings}
    config = Config(**given)
    save_config(config, folder / "slideformer.yaml")
    graph = compile_step(small_spec(), small_plan())
    write_trace(folder, graph, simulate(graph, "a100", instances=2))
    return folder
