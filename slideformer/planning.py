"""Plans of runs, without the runs: nothing large is allocated and no weights are read.

The engine plans by the same functions, so a plan made here for a machine that is not at hand is the
plan that an engine there would run by.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from slideformer.config import Config, EngineConfig
from slideformer.graph.adapters import with_adapters
from slideformer.graph.errors import ConfigError
from slideformer.graph.graph import TaskGraph
from slideformer.graph.groups import TrainingRule, apply_rules
from slideformer.graph.machines import Machine
from slideformer.graph.model import Lora, ModelSpec
from slideformer.graph.plan import (
    UNLIMITED,
    Budgets,
    Compute,
    MemoryPlan,
    Optimizer,
    mlp_tile,
)
from slideformer.graph.profile import MachineProfile
from slideformer.memory.limits import free_nvme
from slideformer.memory.planner import make_plan as make_plan
from slideformer.memory.request import PlanRequest as PlanRequest
from slideformer.memory.request import Prediction
from slideformer.models.families import decoder_config, read_model_config
from slideformer.models.settings import ModelSettings
from slideformer.models.shapes import shape_settings
from slideformer.models.units import model_spec
from slideformer.models.workspace import allocator_slack, head_workspace_bytes, workspace_bytes
from slideformer.runtime.nvme_files import stale_nbytes
from slideformer.runtime.policies import make_policy
from slideformer.runtime.simulated import simulate


def spec_for(model: ModelSettings, config: EngineConfig) -> ModelSpec:
    """The model's units, and how their parameters are trained by ``config``.

    Raises `ConfigError` for adapters or a parameter group that cannot work, or
    `UnsupportedModelError`.
    """
    rules: list[TrainingRule] = []
    for number, group in enumerate(config.parameter_groups, start=1):
        scale = 1.0 if group.lr_scale is None else group.lr_scale
        if group.lr is not None:
            if config.lr == 0:
                raise ConfigError(
                    f"parameter_groups: group {number}: lr is {group.lr}, which follows the run's "
                    "lr in proportion, but that is 0; set it as well"
                )
            scale = group.lr / config.lr
        if group.frozen and config.lora is not None:
            raise ConfigError(
                f"parameter_groups: group {number} is frozen, but with lora all but the adapters "
                "is; choose those by its target_modules"
            )
        rules.append(TrainingRule(group.pattern, scale, group.weight_decay, group.frozen))
    spec = model_spec(model)
    if config.lora is not None:
        asked = config.lora
        spec = with_adapters(spec, Lora(asked.rank, asked.alpha, asked.target_modules))
    return apply_rules(spec, rules)


def plan_for(
    model: ModelSettings,
    config: EngineConfig,
    budgets: Budgets,
    profile: MachineProfile,
    numerics: Mapping[str, str | int] = MappingProxyType({}),
) -> MemoryPlan:
    """The plan for a model under ``budgets`` on a machine of that ``profile``.

    Raises what `plan_request` raises, and `BudgetError`.
    """
    return make_plan(plan_request(model, config, budgets, profile, numerics))


def plan_request(
    model: ModelSettings,
    config: EngineConfig,
    budgets: Budgets,
    profile: MachineProfile,
    numerics: Mapping[str, str | int] = MappingProxyType({}),
) -> PlanRequest:
    """What the planner is asked for.

    What ``numerics`` (`numerics_of`) of a run to be resumed hold of the plan's choices is kept.
    ``config.model`` is not opened, and the budgets and device of ``config`` are not looked at.
    Raises `ConfigError` or `UnsupportedModelError`.
    """
    spec, decoder = spec_for(model, config), decoder_config(model)
    if config.seq_len > spec.max_positions:
        raise ConfigError(
            f"seq_len is {config.seq_len}, but the model has positions for {spec.max_positions}; "
            f"use --seq-len {spec.max_positions} or less"
        )
    make_policy(config.policy)  # refuses an unknown name
    compute = Compute(config.compute)
    inner = 0 if spec.lora is None else 2 * 3 * spec.lora.rank

    def workspace(rows: int, vocab_rows: int, tile: int) -> int:
        tokens, seq_len, size = rows * config.seq_len, config.seq_len, compute.nbytes
        layers = workspace_bytes(
            decoder, tokens, size, seq_len, packed=config.packing, tile=mlp_tile(rows, seq_len)
        )
        layers += tokens * size * inner  # a projection's inner products and their gradient
        head = head_workspace_bytes(vocab_rows, tile, tokens, size)
        most = max(layers, head + tokens * spec.hidden * size)
        return most + (allocator_slack(most) if profile.gpu_overhead else 0)

    def predict(graph: TaskGraph, machine: MachineProfile, steps: int) -> Prediction:
        """Simulate under a policy of the same kind."""
        timeline = simulate(graph, make_policy(config.policy), machine, instances=steps)
        stops = {span.task: span.stopped for span in timeline.instance(0).spans}
        return Prediction(timeline.step_seconds, stops)

    return PlanRequest(
        spec=spec,
        rows=config.step_rows,
        seq_len=config.seq_len,
        compute=compute,
        budgets=budgets,
        profile=profile,
        workspace=workspace,
        predict=predict,
        micro_rows=_chosen(numerics, "micro_rows") or config.micro_batch,
        vocab_chunks=_chosen(numerics, "vocab_chunks"),
        head_tile=_chosen(numerics, "head_tile"),
        window=config.window,
        packed=config.packing,
        optimizer=Optimizer(config.optimizer),
        deferred=config.deferred,
        resumed=bool(numerics),
        checkpoints=isinstance(config, Config) and config.checkpoint_every is not None,
    )


def _chosen(numerics: Mapping[str, str | int], name: str) -> int | None:
    value = numerics.get(name)
    return None if value is None else int(value)


def budgets_on(machine: Machine, config: EngineConfig) -> Budgets:
    """The budgets asked for; otherwise the whole GPU of ``machine``, and a host without end."""
    nvme = config.nvme_memory or free_nvme(config.nvme, stale_nbytes)
    gpu, host = config.gpu_memory or machine.gpu_memory, config.cpu_memory or UNLIMITED
    return Budgets(gpu, host, nvme, config.nvme_write_limit)


def model_settings(model: Path | None, shape: str | None) -> ModelSettings:
    """What is read of a model folder or of a named shape, which loads no torch; one is given.

    Raises `ConfigError`, or for a folder `CheckpointError` or `UnsupportedModelError`.
    """
    if model is not None and shape is None:
        return read_model_config(model)
    if shape is not None and model is None:
        return shape_settings(shape)
    raise ConfigError("give either --model, a model folder, or --shape, a named shape")
