"""What an engine's state is at first: that of a checkpoint or of a model folder, or random."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from transformers import PretrainedConfig

from slideformer.checkpointing import Checkpoint
from slideformer.graph.model import ModelSpec
from slideformer.models.adapter_files import init_adapters
from slideformer.models.weights import init_random, load_weights
from slideformer.run_memory import RunMemory


def fill(
    memory: RunMemory,
    spec: ModelSpec,
    model: Path,
    initial: PretrainedConfig | None,
    checkpoint: Checkpoint | None,
) -> torch.dtype:
    """Fill all masters and moments; returns the dtype that the weights are saved in.

    They are those of ``checkpoint``, else random ones of the shape ``initial``, else those of the
    folder ``model`` with moments of zero. Of adapters, ``checkpoint`` has nothing but them.
    Raises `CheckpointError` or `StoreError`.
    """
    for state in memory.states.values():  # host memory is zero already
        if state.m.is_cuda:
            for moment in (state.m, state.v, state.scales):
                moment.zero_()
    if checkpoint is not None:
        for unit in spec.saved_units:
            memory.load(unit.name, partial(checkpoint.read, unit))
        if spec.lora is None:
            return checkpoint.stored
    masters = memory.masters()

    def filled(unit: str) -> None:
        memory.put(unit, *masters[unit])

    if spec.lora is not None and checkpoint is None:
        init_adapters(spec, masters, seed=0)
    if initial is None:
        return load_weights(model, spec, masters, filled)
    init_random(initial, spec, masters, seed=0, filled=filled)
    return torch.bfloat16
