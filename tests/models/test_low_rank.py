"""Adapters on projections against autograd, and a layer with them."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slideformer.graph.adapters import with_adapters
from slideformer.graph.errors import ConfigError
from slideformer.graph.model import Lora
from slideformer.models.adapter_files import init_adapters
from slideformer.models.low_rank import LowRank
from slideformer.models.units import model_spec
from tests.models.tiny import empty_masters, joined, tiny_config


@st.composite
def projections(draw: st.DrawFn) -> tuple[int, int, int, tuple[tuple[int, int], ...]]:
    """Inputs, rank, outputs, and some ranges of the outputs."""
    cuts = sorted(draw(st.sets(st.integers(0, 12), min_size=2, max_size=5)))
    pieces = list(pairwise(cuts))
    parts = tuple(sorted(draw(st.sets(st.sampled_from(pieces), min_size=1))))
    return draw(st.integers(1, 9)), draw(st.integers(1, 4)), cuts[-1] + 1, parts


@settings(max_examples=30)
@given(projections(), st.integers(1, 7), st.booleans(), st.integers(0, 99))
def test_forward_and_backward_equal_autograd(
    shape: tuple[int, int, int, tuple[tuple[int, int], ...]], tokens: int, more: bool, seed: int
) -> None:
    inputs, rank, outputs, parts = shape
    torch.manual_seed(seed)
    rows = sum(last - first for first, last in parts)
    x, dy = torch.randn(tokens, inputs), torch.randn(tokens, outputs)
    a, b = torch.randn(len(parts) * rank, inputs), torch.randn(rows, rank)
    base = torch.randn(tokens, outputs)

    expected = base.clone()
    leaves = [each.clone().requires_grad_() for each in (x, a, b)]
    start = 0
    for i, (first, last) in enumerate(parts):
        inner = leaves[0] @ leaves[1][i * rank : (i + 1) * rank].T
        added = inner @ leaves[2][start : start + last - first].T
        padded = torch.nn.functional.pad(added, (first, outputs - last))
        expected = expected + 0.75 * padded
        start += last - first
    expected.backward(dy)

    adapter = LowRank(a, b, parts, 0.75)
    out, d_x = base.clone(), torch.ones_like(x)
    adapter.add_(out, x)
    adapter.add_input_gradient_(d_x, dy)
    before = 1.0 if more else math.nan
    d_a, d_b = torch.full_like(a, before), torch.full_like(b, before)
    adapter.gradients(d_a, d_b, dy, x, accumulate=more)
    found = [out, d_x - 1, d_a - int(more), d_b - int(more)]
    wanted = [expected.detach(), *(leaf.grad for leaf in leaves)]
    for ours, reference in zip(found, wanted, strict=True):
        assert reference is not None
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("variant", "modules"), [("llama", ()), ("qwen3", ("v_proj", "q_proj")), ("phi3", ())]
)
def test_a_layer_gets_one_unit_of_adapters(variant: str, modules: tuple[str, ...]) -> None:
    plain = model_spec(tiny_config(variant))
    spec = with_adapters(plain, Lora(4, 8.0, modules))
    assert spec.own_units == tuple(spec.unit(u.name) for u in plain.units)
    assert all(unit.frozen for unit in spec.own_units)
    assert [unit.name for unit in spec.saved_units] == ["A00", "A01", "A02"]
    assert spec.lowest_trained == 0
    for layer, adapter in spec.adapters.items():
        keys = {p.key: p.shape for p in spec.unit(layer).params if p.key.endswith("_proj.weight")}
        chosen = {k: s for k, s in keys.items() if not modules or k.split(".")[-2] in modules}
        assert chosen
        expected: dict[str, Any] = {}
        for key, (rows, columns) in chosen.items():
            stem = key.removesuffix(".weight")
            expected[f"{stem}.lora_A.weight"] = (4, columns)
            expected[f"{stem}.lora_B.weight"] = (rows, 4)
        assert {p.key: p.shape for p in adapter.params} == expected


def test_a_module_that_layers_lack_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"has 'key', but the layers .* have down_"):
        with_adapters(model_spec(tiny_config()), Lora(4, 8.0, ("q_proj", "key")))


def test_adapters_begin_as_in_peft() -> None:
    spec = with_adapters(model_spec(tiny_config()), Lora(8, 8.0))
    masters = empty_masters(spec)
    init_adapters(spec, masters, seed=0)
    again = empty_masters(spec)
    init_adapters(spec, again, seed=0)
    adapters = {u.name for u in spec.adapters.values()}
    seen: list[Tensor] = []
    for key, value in joined(spec, masters):
        if ".lora_B." in key:
            assert not value.any()
        elif ".lora_A." in key:
            bound = value.shape[1] ** -0.5
            assert 0.9 * bound < value.abs().max() <= bound
            assert not any(torch.equal(value, other) for other in seen), "each has its own"
            seen.append(value)
    for name in adapters:
        assert all(torch.equal(x, y) for x, y in zip(masters[name], again[name], strict=True))
