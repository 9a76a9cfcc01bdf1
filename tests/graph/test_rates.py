"""Rates of products: exact where measured, between neighbours elsewhere, a rule without points."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slideformer.graph.rates import HALF_RATE_TOKENS, ProductRates, RatePoint
from slideformer.graph.tasks import Product, ProductKind

FORWARD = ProductKind.FORWARD
GRID = ProductRates(
    1e15,
    tuple(
        RatePoint(FORWARD, width, tokens, rate)
        for width, tokens, rate in [
            (1024, 256, 1e12),
            (1024, 4096, 16e12),
            (4096, 256, 4e12),
            (4096, 4096, 64e12),
        ]
    ),
)


def test_a_measured_point_is_returned() -> None:
    for point in GRID.points:
        assert GRID.rate(FORWARD, point.width, point.tokens) == pytest.approx(point.rate)


def test_between_points_the_logarithm_is_linear() -> None:
    assert GRID.rate(FORWARD, 1024, 1024) == pytest.approx(4e12)
    assert GRID.rate(FORWARD, 2048, 256) == pytest.approx(2e12)
    assert GRID.rate(FORWARD, 2048, 1024) == pytest.approx(8e12)


def test_beyond_the_points() -> None:
    assert GRID.rate(FORWARD, 1024, 1 << 20) == pytest.approx(16e12)
    assert GRID.rate(FORWARD, 64, 256) == pytest.approx(1e12)
    # Half the tokens take as long as the fewest that were measured.
    whole, half = (Product(FORWARD, n, n, 1024) for n in (256, 128))
    assert GRID.seconds([half]) == pytest.approx(GRID.seconds([whole]))


@pytest.mark.parametrize("kind", ProductKind)
def test_a_kind_without_points_follows_the_rule(kind: ProductKind) -> None:
    bare = ProductRates(1e15)
    assert bare.rate(kind, 4096, HALF_RATE_TOKENS[kind]) == pytest.approx(0.5e15)
    if kind is not FORWARD:
        assert GRID.rate(kind, 1, 77) == bare.rate(kind, 1, 77)


@given(st.integers(1, 1 << 20), st.integers(256, 1 << 20))
def test_no_rate_leaves_the_range_of_the_points(width: int, tokens: int) -> None:
    assert 1e12 * (1 - 1e-9) <= GRID.rate(FORWARD, width, tokens) <= 64e12 * (1 + 1e-9)


def test_products_one_after_another() -> None:
    products = [Product(FORWARD, 3 * 10**12, 256, 1024), Product(FORWARD, 10**12, 256, 4096)]
    assert GRID.seconds(products) == pytest.approx(3.25)
