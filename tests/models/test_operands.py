"""The operands of a unit, what lies between them, and what of it is trained."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from slideformer.graph.model import ModelSpec
from slideformer.models.operands import (
    never_written,
    operands,
    padding,
    trained_operands,
    written_in_vain,
)
from tests.support.specs import freeze, specs


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


@given(specs(), st.data())
def test_every_element_is_written_or_never_and_frozen_ones_are_zeroed(
    spec: ModelSpec, data: st.DataObject
) -> None:
    keys = [param.key for unit in spec.units for param in unit.params]
    spec = freeze(spec, data.draw(st.sets(st.sampled_from(keys))))
    for unit in spec.units:
        flat = torch.zeros(unit.numel)
        for view in (*trained_operands(flat, unit).values(), *never_written(flat, unit)):
            view += 1
        assert torch.equal(flat, torch.ones(unit.numel))
        for view in (*never_written(flat, unit), *written_in_vain(flat, unit)):
            view.zero_()
        expected = torch.zeros(unit.numel)
        for param in unit.params:
            if not param.frozen:
                expected[param.offset : param.offset + param.numel] = 1
        assert torch.equal(flat, expected)
