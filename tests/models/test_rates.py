"""At which rates the elements of a chunk are updated."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from slideformer.graph.model import ModelSpec, ParamSpec
from slideformer.kernels.adamw import AdamW
from slideformer.models.rates import Rates, rate_runs, segments
from tests.support.specs import specs

OPTIMIZER = AdamW(lr=0.5, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.25, step=1)


def expected(param: ParamSpec) -> tuple[float, float]:
    """Learning rate and weight decay of a parameter in a step of `OPTIMIZER`."""
    decay = param.weight_decay
    if decay is None:
        decay = OPTIMIZER.weight_decay if param.decay else 0.0
    return OPTIMIZER.lr * param.lr_scale, decay


@given(specs(), st.data())
def test_every_element_of_a_chunk_has_the_rates_of_its_parameter(
    spec: ModelSpec, data: st.DataObject
) -> None:
    unit = data.draw(st.sampled_from(spec.units))
    rates = st.sampled_from([(1.0, None), (1.0, 0.25), (0.5, None), (0.0, 0.0)])
    drawn = [(*data.draw(rates), data.draw(st.booleans())) for _ in unit.params]
    params = tuple(
        replace(param, lr_scale=scale, weight_decay=decay, frozen=frozen)
        for param, (scale, decay, frozen) in zip(unit.params, drawn, strict=True)
    )
    unit = replace(unit, params=params)
    begin = data.draw(st.integers(0, unit.numel - 1))
    end = data.draw(st.integers(begin + 1, unit.numel))
    runs = rate_runs(unit, begin, end)
    found: list[tuple[float, float] | None] = []
    for segment in segments(runs, OPTIMIZER):
        assert len(found) <= segment.begin < segment.end <= end - begin
        found += [None] * (segment.begin - len(found))
        found += [(segment.lr, segment.weight_decay)] * (segment.end - segment.begin)
    found += [None] * (end - begin - len(found))
    for param in unit.params:
        for element in range(param.offset, param.offset + param.numel):
            if begin <= element < end:
                assert found[element - begin] == (None if param.frozen else expected(param))
        applied = Rates.of(param).applied(OPTIMIZER)
        assert (applied.lr, applied.weight_decay) == expected(param)
    touching = [(a, b) for a, b in pairwise(runs) if a.end == b.begin]
    assert all(a.rates != b.rates for a, b in touching), "as few runs as possible"
