"""Which elements of a chunk decay; what lies between operands."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from slideformer.graph.model import ModelSpec
from slideformer.models.bindings import operands, padding
from slideformer.models.update_ops import decay_runs
from tests.support.specs import specs


@given(specs(), st.data())
def test_decay_covers_every_element_of_a_chunk_as_its_parameter_says(
    spec: ModelSpec, data: st.DataObject
) -> None:
    unit = data.draw(st.sampled_from(spec.units))
    begin = data.draw(st.integers(0, unit.numel - 1))
    end = data.draw(st.integers(begin + 1, unit.numel))
    runs = decay_runs(unit, begin, end)
    decays: list[bool] = []
    for start, stop, decay in runs:
        assert start == len(decays) < stop, "runs follow one another"
        decays += [decay] * (stop - start)
    assert len(decays) == end - begin
    for param in unit.params:
        for element in range(param.offset, param.offset + param.numel):
            if begin <= element < end:
                assert decays[element - begin] == param.decay
    kinds = [decay for _, _, decay in runs]
    assert all(a != b for a, b in pairwise(kinds)), "as few runs as possible"


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
