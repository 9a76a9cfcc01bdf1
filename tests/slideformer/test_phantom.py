"""Phantom runs do the work of the whole model in the memory of a part of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from slideformer.config import EngineConfig
from slideformer.engine import Engine
from slideformer.graph.buffers import HOST_TIERS
from slideformer.graph.plan import Budgets, Compute, Optimizer
from slideformer.measuring.trial import random_batches
from slideformer.phantom import REAL_LAYERS, phantom_budgets, phantom_layers, spared_nbytes
from slideformer.planning import plan_for, spec_for
from slideformer.this_machine import profile_for
from slideformer.tools.bench.rows import parse_row
from tests.models.tiny import tiny_config

LAYERS = 5


def make(**settings: Any) -> Engine:
    shape = tiny_config(num_hidden_layers=LAYERS)
    config = EngineConfig(
        model="none",
        batch_size=2,
        seq_len=16,
        device="cpu",
        compute="fp32",
        gpu_memory=1 << 30,
        cpu_memory=4 << 30,
        threads=1,
    )
    return Engine(config, initial=shape, **settings)


def test_a_phantom_step_is_the_real_one_in_less_memory() -> None:
    with make() as real, make(phantom=True) as phantom:
        assert not real.plan.resident
        assert replace(phantom.plan, peaks={}) == replace(real.plan, peaks={})
        assert [t.name for t in phantom.graph.tasks] == [t.name for t in real.graph.tasks]
        layers = phantom_layers(phantom.spec, phantom.plan)
        assert len(layers) == LAYERS - REAL_LAYERS
        allocated = [
            sum(engine._memory.arenas._layout.sizes.get(tier, 0) for tier in HOST_TIERS)
            for engine in (real, phantom)
        ]
        spared = allocated[0] - allocated[1]
        expected = spared_nbytes(phantom.spec, layers, Compute.FP32, 2)
        assert expected <= spared < expected + 2 * 4096 * len(layers)
        for batch in random_batches(phantom.spec.vocab, 2, 16, 3):
            loss = phantom.step(batch).loss()
        assert torch.tensor(loss).isfinite()
        states = phantom._memory.states
        assert torch.equal(states["L04"].m, states["L00"].m)
        assert states["L04"].m.any()
        assert not torch.equal(states["L01"].hi, states["L00"].hi)


def test_its_budget_is_that_of_the_whole_model() -> None:
    """What fits beside the layers with memory of their own fits."""
    with make(phantom=True) as engine:
        spec, config = engine.spec, engine.config
        shape = engine._hf_config
    least = Budgets(1 << 30, 4 << 30)
    more = phantom_budgets(spec, least, Compute.FP32, 2)
    layers = (LAYERS - REAL_LAYERS) * 12 * spec.layers[0].numel
    assert more == replace(least, host=least.host + layers)
    plan = plan_for(shape, config, more, profile_for(torch.device("cpu")))
    assert plan.peaks


@pytest.mark.parametrize(
    ("settings", "nbytes"),
    [
        ({}, 12),
        ({"optimizer": "lion"}, 8),
        ({"optimizer": "adamw8bit"}, 6 + 8 / 128),
        ({"lora": {"rank": 2, "alpha": 2}}, 2),
    ],
)
def test_it_pretends_to_have_what_its_layers_would_take(
    settings: dict[str, Any], nbytes: float
) -> None:
    config = EngineConfig(model="none", compute="bf16", **settings)
    spec = spec_for(tiny_config(num_hidden_layers=LAYERS), config)
    least = Budgets(1 << 30, 4 << 30)
    more = phantom_budgets(spec, least, Compute.BF16, Optimizer(config.optimizer))
    expected = (LAYERS - REAL_LAYERS) * nbytes * spec.layers[0].numel
    assert more.host - least.host == pytest.approx(expected, abs=8 * LAYERS)


def test_the_benchmark_names_it() -> None:
    assert "phantom" in parse_row("tiny:2:1GiB:4GiB:layer:phantom=true", {}).label
