"""Phantom runs: the speed of a model whose state does not fit, on a machine that cannot hold it.

Graph, slots, kernels, copies and updates are those of the whole model, and so are the boundaries;
only the state of most decoder layers lies in the memory of others. A phantom run takes the time of
the real one and learns nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from slideformer.graph.model import ModelSpec
from slideformer.graph.plan import Budgets, Compute, MemoryPlan, Optimizer
from slideformer.graph.state import parts_nbytes, state_parts

REAL_LAYERS = 2
"""Layers with memory of their own: with one, a layer's update would wait for its neighbour's."""

_KINDS = ("hi", "state")


def phantom_layers(spec: ModelSpec, plan: MemoryPlan) -> dict[str, str]:
    """Layer → the layer in whose memory its state lies, for all streamed layers but the first."""
    streamed = [unit.name for unit in spec.layers if unit.name not in plan.resident]
    return {
        name: streamed[position % REAL_LAYERS]
        for position, name in enumerate(streamed)
        if position >= REAL_LAYERS
    }


def shared_places(layers: dict[str, str]) -> dict[str, str]:
    """The same for places in host memory."""
    return {f"{kind}.{a}": f"{kind}.{b}" for a, b in layers.items() for kind in _KINDS}


def spared_nbytes(
    spec: ModelSpec, layers: Iterable[str], compute: Compute, optimizer: Optimizer
) -> int:
    """Bytes of host memory that the phantom ``layers`` spare."""
    units = [spec.unit(name) for name in layers]
    return sum(parts_nbytes(state_parts(unit, compute, optimizer), unit.numel) for unit in units)


def real_part(spec: ModelSpec, layers: dict[str, str]) -> ModelSpec:
    """The units with memory of their own."""
    return replace(spec, units=tuple(unit for unit in spec.units if unit.name not in layers))


def phantom_budgets(
    spec: ModelSpec, budgets: Budgets, compute: Compute, optimizer: Optimizer
) -> Budgets:
    """``budgets`` with the host memory that a phantom run pretends to have if all is streamed."""
    layers = [unit.name for unit in spec.layers[REAL_LAYERS:]]
    spared = spared_nbytes(spec, layers, compute, optimizer)
    return replace(budgets, host=budgets.host + spared, nvme=0)
