"""How fast a machine does matrix products, by kind and size: measured points and what lies between.

A layer's products reach a larger share of a GPU's rate the more tokens go through them at once, and
its work beside products weighs less the wider it is. So a rate is looked up by both.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from slideformer.graph.tasks import Product, ProductKind

HALF_RATE_TOKENS: Mapping[ProductKind, int] = {
    ProductKind.FORWARD: 512,
    ProductKind.GRADIENT: 512,
    ProductKind.SUMMED: 1152,
    ProductKind.ATTENTION: 512,
    ProductKind.HEAD: 512,
}
"""Tokens T₀ of the rule for machines without points: T/(T + T₀) of the sustained rate.

512 fits decoder layers of 3 to 123 billion-parameter models on an H100 within a few percent. Sums
in FP32 read and write 8 bytes per weight more for 4·T FLOPs, which at 640 TFLOP/s and 2 TB/s is
what 640 more tokens would take.
"""


@dataclass(frozen=True, slots=True)
class RatePoint:
    """A measured rate in FLOP/s of one kind of product, at a width and a number of tokens."""

    kind: ProductKind
    width: int
    tokens: int
    rate: float


@dataclass(frozen=True)
class ProductRates:
    """FLOP/s of products: between measured points by interpolation, without any by a rule.

    Between points the logarithm of the rate is linear in those of tokens and width. Below the
    fewest measured tokens a product takes as long as there, since launching it does; beyond the
    most, and beyond the measured widths, the rate stays what it is. A kind without points has the
    rate that `HALF_RATE_TOKENS` gives of ``sustained``.
    """

    sustained: float
    points: tuple[RatePoint, ...] = ()
    _known: dict[tuple[ProductKind, int, int], float] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def seconds(self, products: Iterable[Product]) -> float:
        """How long products take, one after another."""
        return sum(p.flops / self.rate(p.kind, p.width, p.tokens) for p in products)

    def rate(self, kind: ProductKind, width: int, tokens: int) -> float:
        """FLOP/s of products of that kind and size."""
        key = (kind, width, tokens)
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = self._look_up(kind, width, tokens)
        return found

    def _look_up(self, kind: ProductKind, width: int, tokens: int) -> float:
        points = sorted(
            (p for p in self.points if p.kind is kind), key=lambda p: (p.width, p.tokens)
        )
        if not points:
            return self.sustained * tokens / (tokens + HALF_RATE_TOKENS[kind])
        curve = [
            (each, _at_tokens([(p.tokens, p.rate) for p in group], tokens))
            for each, group in groupby(points, key=lambda p: p.width)
        ]
        return _between(curve, width)


def _at_tokens(curve: Sequence[tuple[int, float]], tokens: int) -> float:
    fewest, rate = curve[0]
    return rate * tokens / fewest if tokens < fewest else _between(curve, tokens)


def _between(curve: Sequence[tuple[int, float]], at: int) -> float:
    """The value at a place of an ascending curve; its ends reach on."""
    right = bisect_left(curve, at, key=lambda point: point[0])
    if right == 0 or right == len(curve):
        return curve[min(right, len(curve) - 1)][1]
    (x0, y0), (x1, y1) = curve[right - 1], curve[right]
    share = math.log(at / x0) / math.log(x1 / x0)
    return math.exp((1 - share) * math.log(y0) + share * math.log(y1))
