"""The flags that decide a step's graph, and the plan and graph that come of them.

Shared by the commands that work on steps. Needs no GPU; nothing large is allocated.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slideformer.config import EngineConfig
from slideformer.config_problems import flag_name
from slideformer.graph.machines import Machine, load_machine
from slideformer.graph.plan import UNLIMITED, Budgets, MachineProfile, MemoryPlan
from slideformer.profiles import announce, cached_machine
from slideformer.tools.setting_flags import PLANNED

if TYPE_CHECKING:
    from slideformer.graph.graph import TaskGraph

Model = Annotated[
    Path | None, typer.Option(help="Checkpoint folder; its config.json is enough.", metavar="DIR")
]
Shape = Annotated[str | None, typer.Option(help="Named shape, as llama3-8b.", metavar="NAME")]
_MACHINE = typer.Option(
    "--machine",
    help="Named machine, as rtx4090, or a profile file. Without it this one, as measured.",
    metavar="NAME",
)
MachineName = Annotated[str | None, _MACHINE]
UNMEASURED = "h200"
"""The machine that predictions are for if none is named and this one was not measured."""

STEP = tuple(name for name in PLANNED if name != "model")
"""Settings that decide a step, beside its model."""


@dataclass(frozen=True)
class PlannedStep:
    """A step of a model on a machine; without a ``machine`` it is planned for this one."""

    config: EngineConfig
    machine: Machine | None
    profile: MachineProfile
    budgets: Budgets
    plan: MemoryPlan
    graph: TaskGraph


def chosen_machine(name: str | None) -> Machine:
    """The machine of that name or file; without one this machine, if `slideformer profile` ran."""
    if name is None and (measured := cached_machine()) is not None:
        announce(measured)
        return measured
    return load_machine(name or UNMEASURED)


def plan_step(
    model: Path | None, shape: str | None, machine: str | None, **settings: Any
) -> PlannedStep:
    """Plan and compile a step; ``settings`` are those of `EngineConfig`, None where not given.

    On a named machine the budgets default to its GPU's memory and to unlimited host memory. Raises
    `ConfigError`, `BudgetError`, `CheckpointError` or `UnsupportedModelError`.
    """
    known = load_machine(machine) if machine is not None else None
    given = {name: value for name, value in settings.items() if value not in (None, [])}
    config = EngineConfig.model_validate(
        {"model": model or Path(shape or "."), "device": "auto", **given},
        context={name: flag_name(name) for name in given},
    )
    from slideformer.planning import (
        budgets_for,
        device_for,
        model_config,
        plan_for,
        profile_for,
        step_graph,
    )

    hf_config, wanted, device = model_config(model, shape), config, device_for(config)
    if known is None:
        profile = profile_for(device, config.nvme)
    else:
        profile = known.profile
        room = {
            "gpu_memory": config.gpu_memory or known.gpu_memory,
            "cpu_memory": config.cpu_memory or UNLIMITED,
        }
        wanted = config.model_copy(update=room)
    budgets = budgets_for(wanted, device)
    plan = plan_for(hf_config, config, budgets, profile)
    return PlannedStep(config, known, profile, budgets, plan, step_graph(hf_config, plan))
