"""How a unit's parameters lie in its flat storage."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from slideformer.graph.model import ALIGNMENT, ModelSpec, ParamGroup, UnitKind, layout_unit
from tests.support.specs import small_spec, specs


@st.composite
def groups(draw: st.DrawFn) -> list[ParamGroup]:
    """Operands of one to three stacked parameters, matrices and vectors."""
    drawn = []
    for number in range(draw(st.integers(1, 5))):
        columns = draw(st.one_of(st.just(()), st.tuples(st.integers(1, 30))))
        rows = draw(st.lists(st.integers(1, 20), min_size=1, max_size=3))
        params = tuple((f"p{number}.{i}", (r, *columns)) for i, r in enumerate(rows))
        drawn.append(ParamGroup(f"o{number}", params, draw(st.booleans())))
    return drawn


@given(groups())
def test_groups_are_aligned_and_their_parameters_touch(drawn: list[ParamGroup]) -> None:
    unit = layout_unit("L00", UnitKind.LAYER, drawn)
    assert [p.key for p in unit.params] == [key for group in drawn for key, _ in group.params]
    position = 0
    params = iter(unit.params)
    for group, operand in zip(drawn, unit.operands, strict=True):
        assert operand.offset % ALIGNMENT == 0
        assert 0 <= operand.offset - position < ALIGNMENT, "no more padding than alignment needs"
        position = operand.offset
        for key, shape in group.params:
            param = next(params)
            assert (param.key, param.shape, param.decay) == (key, shape, group.decay)
            assert param.offset == position
            assert param.numel == math.prod(shape)
            position += param.numel
        assert operand.name == group.operand
        assert operand.offset + operand.numel == position, "the operand is its parameters"
    assert unit.numel == position
    assert unit.param_count == sum(math.prod(s) for g in drawn for _, s in g.params)
    matrices = [g for g in drawn if len(g.params[0][1]) == 2]
    assert unit.matrix_numel == sum(math.prod(s) for g in matrices for _, s in g.params)


@given(specs())
def test_a_model_finds_its_units(spec: ModelSpec) -> None:
    assert [unit.name for unit in spec.layers] == [f"L{i:02d}" for i in range(len(spec.layers))]
    assert spec.embed is spec.units[0]
    assert spec.norm.kind is UnitKind.NORM
    assert spec.head is (spec.embed if spec.tied else spec.units[-1])
    assert all(spec.unit(unit.name) is unit for unit in spec.units)
    assert spec.param_count == sum(p.numel for unit in spec.units for p in unit.params)


def test_a_tied_matrix_counts_once() -> None:
    untied, tied = small_spec(), small_spec(tied=True)
    assert untied.param_count - tied.param_count == tied.vocab * tied.hidden
