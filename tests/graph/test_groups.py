"""Parameter groups: the first match decides, and a group that decides nothing is refused."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slideformer.graph.errors import ConfigError
from slideformer.graph.groups import TrainingRule, apply_rules
from slideformer.graph.model import ParamSpec
from tests.support.specs import small_spec

SPEC = small_spec()
PATTERNS = ["*", "layers.*", "*.[qkv]", "*norm*", "layers.1.*", "embed.weight", "*.down"]


def params(spec: object = SPEC) -> dict[str, ParamSpec]:
    """Every parameter by name."""
    return {param.key: param for unit in spec.units for param in unit.params}  # type: ignore[attr-defined]


@given(st.lists(st.sampled_from(PATTERNS), unique=True, max_size=4))
def test_the_first_match_decides(patterns: list[str]) -> None:
    rules = [TrainingRule(pattern, i + 2.0, i + 3.0) for i, pattern in enumerate(patterns)]
    first = {
        key: next((i for i, pattern in enumerate(patterns) if fnmatchcase(key, pattern)), None)
        for key in params()
    }
    unused = set(range(len(patterns))) - set(first.values())
    if unused:
        with pytest.raises(ConfigError, match=f"group {min(unused) + 1}: .* put it before them"):
            apply_rules(SPEC, rules)
        return
    changed = params(apply_rules(SPEC, rules))
    for key, param in params().items():
        number = first[key]
        rates = (1.0, None) if number is None else (number + 2.0, number + 3.0)
        assert (changed[key].lr_scale, changed[key].weight_decay) == rates
        assert (changed[key].shape, changed[key].offset) == (param.shape, param.offset)


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("layers.1.dwn", "layers.1.down"),
        ("embed", "embed.weight"),
        ("*.qk", "layers.2.q"),
        ("Layers.0.norm", "layers.0.norm"),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused_with_the_nearest_names(
    pattern: str, near: str
) -> None:
    rules = [TrainingRule("*.up"), TrainingRule(pattern)]
    message = f"parameter_groups: group 2: pattern {pattern!r} matches no parameter of the model"
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        apply_rules(SPEC, rules)
    assert near in str(caught.value).rsplit("nearest are ", 1)[1].split(", ")


def test_a_model_with_nothing_to_train_is_refused() -> None:
    with pytest.raises(ConfigError, match="all parameters are frozen, so there is nothing to tr"):
        apply_rules(SPEC, [TrainingRule("*", frozen=True)])
    spec = apply_rules(SPEC, [TrainingRule("*.1.norm"), TrainingRule("*", frozen=True)])
    assert {key for key, param in params(spec).items() if not param.frozen} == {"layers.1.norm"}
    assert (spec.trained_count, spec.lowest_trained) == (SPEC.hidden, 1)
