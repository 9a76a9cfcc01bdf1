"""What lies between the operands of a unit."""

from __future__ import annotations

import torch
from hypothesis import given

from slideformer.graph.model import ModelSpec
from slideformer.models.bindings import operands, padding
from tests.support.specs import specs


@given(specs())
def test_operands_and_padding_tile_a_unit(spec: ModelSpec) -> None:
    for unit in spec.units:
        flat = torch.zeros(unit.numel)
        for view in operands(flat, unit).values():
            view += 1
        for gap in padding(flat, unit):
            assert len(gap)
            gap += 1
        assert torch.equal(flat, torch.ones(unit.numel))
