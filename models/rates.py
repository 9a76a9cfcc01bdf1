"""At which rates the parameters of a unit are updated in a step."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from slideformer.graph.model import ParamSpec, UnitSpec
from slideformer.kernels.adamw import AdamW, Segment


class Rates(NamedTuple):
    """What a parameter makes of a step's learning rate and weight decay."""

    lr_scale: float
    decays: bool
    weight_decay: float | None

    @classmethod
    def of(cls, param: ParamSpec) -> Rates:
        """The rates of a parameter."""
        return cls(param.lr_scale, param.decay, param.weight_decay)

    def lr(self, optimizer: AdamW) -> float:
        """Learning rate in a step."""
        return optimizer.lr * self.lr_scale

    def decay(self, optimizer: AdamW) -> float:
        """Weight decay in a step."""
        if self.weight_decay is not None:
            return self.weight_decay
        return optimizer.weight_decay if self.decays else 0.0

    def applied(self, optimizer: AdamW) -> AdamW:
        """The optimizer for a parameter that is updated by itself."""
        return replace(optimizer, lr=self.lr(optimizer), weight_decay=self.decay(optimizer))


class RateRun(NamedTuple):
    """Elements ``[begin, end)`` of a chunk that share their rates."""

    begin: int
    end: int
    rates: Rates


def rate_runs(unit: UnitSpec, begin: int, end: int) -> list[RateRun]:
    """Ranges of equal rates in ``[begin, end)``, counted from ``begin``, as few as possible.

    Frozen parameters are left out. Padding belongs to the parameter before it: it is zero, has no
    gradient and stays zero.
    """
    runs: list[RateRun] = []
    ends = [*(p.offset for p in unit.params[1:]), unit.numel]
    for param, stop in zip(unit.params, ends, strict=True):
        low, high = max(param.offset, begin) - begin, min(stop, end) - begin
        if low >= high or param.frozen:
            continue
        rates = Rates.of(param)
        if runs and runs[-1].rates == rates and runs[-1].end == low:
            low = runs.pop().begin
        runs.append(RateRun(low, high, rates))
    return runs


def segments(runs: list[RateRun], optimizer: AdamW) -> list[Segment]:
    """The same ranges with the learning rates and weight decays of a step."""
    return [
        Segment(run.begin, run.end, run.rates.lr(optimizer), run.rates.decay(optimizer))
        for run in runs
    ]
