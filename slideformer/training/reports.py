"""What a training run tells: before it begins, of each step, and in the end."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import TypeAdapter

from slideformer.config import Config, config_text
from slideformer.graph.model import ModelSpec
from slideformer.graph.plan import Budgets, MemoryPlan
from slideformer.graph.serialise import to_json
from slideformer.traces import GRAPH_FILE, TRACE_FILE, to_chrome

if TYPE_CHECKING:
    from slideformer.engine import Engine

CONFIG_FILE = "slideformer.yaml"
"""The merged config, within the output folder and in checkpoints."""

METRICS_FILE = "metrics.jsonl"
"""One `StepMetrics` a line, within the output folder and in checkpoints."""

NUMERICS_FILE = "numerics.json"
"""`Engine.numerics`, within the output folder."""

PLAN_FILE = "plan.json"
"""The model's size and the fields of its `MemoryPlan`, within the output folder."""


@dataclass(frozen=True, slots=True)
class RunStart:
    """What is known before memory is allocated: ``done`` of ``steps`` steps were done before.

    ``budgets`` are those of the plan: what was asked for, but no more than there is.
    """

    config: Config
    spec: ModelSpec
    plan: MemoryPlan
    budgets: Budgets
    steps: int
    done: int = 0


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """One finished step.

    ``step`` counts from 1, ``loss`` is the mean per target token in nats, ``tokens`` are real ones
    (no padding), ``seconds`` is the time since the step before was done. ``skipped``: the gradient
    was not finite, so the step changed nothing. ``validation_loss``, in nats, is of the validation
    data after the step, None where it was not evaluated; its exponential is
    ``validation_perplexity``.
    """

    step: int
    loss: float
    gradient_norm: float
    lr: float
    tokens: int
    seconds: float
    skipped: bool
    validation_loss: float | None = None
    validation_perplexity: float | None = None

    @property
    def evaluated(self) -> bool:
        """Whether the step was evaluated."""
        return self.validation_loss is not None


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """What a run did.

    ``loss`` is that of the last step; ``tokens_per_second`` counts the real tokens of the steps
    since the run was begun or resumed, and leaves the first out if there are others.
    ``interrupted``: Ctrl-C ended the run early; ``exhausted``: ``patience`` did. ``checkpoint`` is
    the last one written, if any, and ``best`` the step with the lowest validation loss.
    """

    steps: int
    loss: float
    tokens_per_second: float
    output: Path
    interrupted: bool
    checkpoint: Path | None = None
    exhausted: bool = False
    best: int | None = None


class Progress(Protocol):
    """What a trainer reports to; called in the thread of `Trainer.train`, so it should be quick."""

    def start(self, run: RunStart) -> None:
        """The run is planned, and nothing large is allocated yet."""

    def step(self, metrics: StepMetrics) -> None:
        """A step is done."""

    def finish(self) -> None:
        """The last step is done, or the run has failed."""


def output_records(
    config: Config, metrics: Iterable[StepMetrics], engine: Engine
) -> dict[str, str]:
    """The files that lie beside the weights in the end, by name.

    Without plan and trace if no step was left to be run.
    """
    records = {
        CONFIG_FILE: config_text(config),
        METRICS_FILE: metrics_lines(metrics),
        NUMERICS_FILE: json.dumps(engine.numerics, indent=2) + "\n",
    }
    graph, timeline = engine.graph, engine.timeline()
    if {task.name for task in graph.tasks} <= {span.task for span in timeline.spans}:
        records |= {
            PLAN_FILE: plan_text(engine.spec, engine.plan),
            GRAPH_FILE: to_json(graph),
            TRACE_FILE: to_chrome(timeline),
        }
    return records


def plan_text(spec: ModelSpec, plan: MemoryPlan) -> str:
    """A plan as JSON for people to read; which gradient waits in which slot is left out."""
    fields = TypeAdapter(MemoryPlan).dump_python(plan, mode="json", exclude={"gradient_slot"})
    fields["resident"].sort()
    size = {"family": spec.family, "parameters": spec.param_count, "layers": len(spec.layers)}
    return json.dumps({"version": 1, **size, **fields}, indent=2) + "\n"


def metrics_lines(metrics: Iterable[StepMetrics]) -> str:
    """The text of a metrics file; JSON has null for numbers that are not finite."""
    return "".join(json.dumps(_plain(each)) + "\n" for each in metrics)


def read_metrics(text: str) -> list[StepMetrics]:
    """The metrics in such a text, with NaN for numbers that were not finite."""
    return [StepMetrics(**_with_nan(json.loads(line))) for line in text.splitlines()]


def _with_nan(values: dict[str, Any]) -> dict[str, Any]:
    return {name: math.nan if value is None else value for name, value in values.items()}


def _plain(metrics: StepMetrics) -> dict[str, float | int | bool | None]:
    return {
        name: value if math.isfinite(value) else None
        for name, value in asdict(metrics).items()
        if value is not None
    }
