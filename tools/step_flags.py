"""The flags that decide a step's graph, and the plan and graph that come of them.

Shared by the commands that work on steps. Needs no GPU; nothing large is allocated.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slideformer.config import EngineConfig, load_engine_config
from slideformer.graph.machines import Machine, load_machine
from slideformer.graph.plan import Budgets, MemoryPlan
from slideformer.graph.profile import MachineProfile
from slideformer.profiles import announce, cached_machine
from slideformer.tools.setting_flags import PLANNED

if TYPE_CHECKING:
    from slideformer.graph.graph import TaskGraph
    from slideformer.planning import PlanRequest

Model = Annotated[
    Path | None, typer.Option(help="Model folder; its config.json is enough.", metavar="DIR")
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
class WantedStep:
    """A step that is to be planned; without a ``machine``, for one that nobody measured."""

    config: EngineConfig
    machine: Machine | None
    request: PlanRequest


@dataclass(frozen=True)
class PlannedStep:
    """A step of a model; without a ``machine`` it is planned for one that nobody measured."""

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
    """Plan and compile a step. Raises what `wanted_step` raises, and `BudgetError`."""
    from slideformer.graph.step import compile_step
    from slideformer.planning import make_plan

    step = wanted_step(model, shape, machine, **settings)
    request, plan = step.request, make_plan(step.request)
    graph = compile_step(request.spec, plan)
    return PlannedStep(step.config, step.machine, request.profile, request.budgets, plan, graph)


def wanted_step(
    model: Path | None,
    shape: str | None,
    machine: str | None,
    file: Path | None = None,
    **settings: Any,
) -> WantedStep:
    """The step that flags ask for; ``settings`` are those of `EngineConfig`, None where not given.

    Flags override the settings of a run in ``file``, a shape its model. On a named machine the
    budgets default to its GPU's memory and to unlimited host memory. A budget for a GPU where there
    is none means one elsewhere, with a context beside the plan. Raises `ConfigError`,
    `CheckpointError`, `DeviceError` or `UnsupportedModelError`.
    """
    known = load_machine(machine) if machine is not None else None
    named = model
    if shape is not None or file is None:
        named = model or Path(shape or ".")
    config = load_engine_config(file, {"model": named, **settings})
    from slideformer.planning import budgets_on, model_settings, plan_request

    folder = config.model if shape is None and file is not None else model
    wanted = model_settings(folder, shape)
    if known is not None:
        profile, budgets = known.profile, budgets_on(known, config)
    else:
        from slideformer.this_machine import budgets_for, device_for, profile_for

        device = device_for(config)
        elsewhere = device.type == "cpu" and config.gpu_memory is not None
        known = None if elsewhere else cached_machine(device.type)
        profile = MachineProfile() if elsewhere else profile_for(device, config.nvme)
        budgets = budgets_for(config, device)
    return WantedStep(config, known, plan_request(wanted, config, budgets, profile))
