"""Parameter groups: how the parameters of a pattern are trained, written into a model's spec.

Patterns apply to names in a model folder, so a group may cover a part of an operand that stacks
several parameters.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from slideformer.graph.errors import ConfigError
from slideformer.graph.model import ModelSpec, ParamSpec


@dataclass(frozen=True, slots=True)
class TrainingRule:
    """What holds for parameters whose whole names match a shell-style ``pattern``.

    ``weight_decay`` None leaves it to the parameter: the run's on matrices, none on vectors.
    """

    pattern: str
    lr_scale: float = 1.0
    weight_decay: float | None = None
    frozen: bool = False

    def applied(self, param: ParamSpec) -> ParamSpec:
        """``param`` under this rule."""
        return replace(
            param,
            lr_scale=self.lr_scale,
            weight_decay=self.weight_decay,
            frozen=self.frozen,
        )


def apply_rules(spec: ModelSpec, rules: Sequence[TrainingRule]) -> ModelSpec:
    """``spec`` with each parameter under the first rule that matches it, if any does.

    What is frozen already, as a model under its adapters, is out of their reach.

    Raises `ConfigError` for a rule that decides no parameter, or if all parameters are frozen.
    """
    used: set[int] = set()

    def under_rules(param: ParamSpec) -> ParamSpec:
        for number, rule in enumerate(rules if not param.frozen else ()):
            if fnmatchcase(param.key, rule.pattern):
                used.add(number)
                return rule.applied(param)
        return param

    units = tuple(
        replace(unit, params=tuple(under_rules(param) for param in unit.params))
        for unit in spec.units
    )
    for number, rule in enumerate(rules):
        if number not in used:
            raise ConfigError(_unused(number + 1, rule, spec))
    if all(unit.frozen for unit in units):
        raise ConfigError(
            "parameter_groups: all parameters are frozen, so there is nothing to train; put a "
            "group of those to train, without frozen, before the others"
        )
    return replace(spec, units=units)


def _unused(number: int, rule: TrainingRule, spec: ModelSpec) -> str:
    where = f"parameter_groups: group {number}: pattern {rule.pattern!r}"
    keys = [param.key for unit in spec.units for param in unit.params if not param.frozen]
    if any(fnmatchcase(key, rule.pattern) for key in keys):
        return f"{where} matches only what groups before it match; put it before them"
    # Of a pattern's stars nothing is known, so they count for nothing.
    near = difflib.get_close_matches(rule.pattern.replace("*", ""), keys, n=3, cutoff=0.0)
    return (
        f"{where} matches no parameter of the model; it must match a whole name, * stands for "
        f"anything. The nearest are {', '.join(near)}"
    )
