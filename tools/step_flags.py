"""The flags that decide a step's graph, and the plan and graph that come of them.

Shared by the commands that work on steps. Needs no GPU; nothing large is allocated.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slideformer.config import EngineConfig, flag_name
from slideformer.graph.machines import Machine, load_machine
from slideformer.graph.plan import Budgets, MachineProfile, MemoryPlan

if TYPE_CHECKING:
    from slideformer.graph.graph import TaskGraph

UNLIMITED = 1 << 62
"""Host budget of a machine that is not at hand, unless one is given."""

Model = Annotated[
    Path | None, typer.Option(help="Checkpoint folder; its config.json is enough.", metavar="DIR")
]
Shape = Annotated[str | None, typer.Option(help="Named shape, as llama3-8b.", metavar="NAME")]
MachineName = Annotated[
    str | None,
    typer.Option("--machine", help="Named machine, as rtx4090, or a profile file.", metavar="NAME"),
]
GpuMemory = Annotated[str | None, typer.Option(help="GPU budget, as 24GiB.", metavar="SIZE")]
CpuMemory = Annotated[str | None, typer.Option(help="Host budget, as 128GiB.", metavar="SIZE")]
BatchSize = Annotated[int | None, typer.Option(help="Rows per step.", metavar="N")]
SeqLen = Annotated[int | None, typer.Option(help="Tokens per row.", metavar="N")]
MicroBatch = Annotated[int | None, typer.Option(help="Rows per micro-batch.", metavar="N")]
Window = Annotated[int | None, typer.Option(help="Weight slots on the GPU.", metavar="N")]
Compute = Annotated[str | None, typer.Option(help="Arithmetic.", metavar="[bf16|fp32]")]
PolicyName = Annotated[
    str | None, typer.Option("--policy", help="Scheduling policy.", metavar="NAME")
]


@dataclass(frozen=True)
class PlannedStep:
    """A step of a model on a machine; without a ``machine`` it is planned for this one."""

    config: EngineConfig
    machine: Machine | None
    profile: MachineProfile
    budgets: Budgets
    plan: MemoryPlan
    graph: TaskGraph


def plan_step(
    model: Path | None, shape: str | None, machine: str | None, **settings: Any
) -> PlannedStep:
    """Plan and compile a step; ``settings`` are those of `EngineConfig`, None where not given.

    On a named machine the budgets default to its GPU's memory and to unlimited host memory. Raises
    `ConfigError`, `BudgetError`, `CheckpointError` or `UnsupportedModelError`.
    """
    known = load_machine(machine) if machine is not None else None
    given = {name: value for name, value in settings.items() if value is not None}
    config = EngineConfig.model_validate(
        {"model": model or Path(shape or "."), "device": "auto", **given},
        context={name: flag_name(name) for name in given},
    )
    from slideformer.planning import budgets_for, device_for, model_config, plan_for, step_graph

    hf_config = model_config(model, shape)
    if known is None:
        profile, budgets = MachineProfile(), budgets_for(config, device_for(config))
    else:
        profile = known.profile
        budgets = Budgets(config.gpu_memory or known.gpu_memory, config.cpu_memory or UNLIMITED)
    plan = plan_for(hf_config, config, budgets, profile)
    return PlannedStep(config, known, profile, budgets, plan, step_graph(hf_config, plan))
