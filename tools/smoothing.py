"""The smoothed loss, as the progress bar and the report show it."""

from __future__ import annotations

import math

SMOOTHING = 0.95


class Smoothed:
    """An exponential average that is not drawn towards its start."""

    def __init__(self) -> None:
        self._sum = 0.0
        self._weight = 0.0

    def add(self, value: float) -> float:
        """The average with one more value; one that is not finite is passed over."""
        if not math.isfinite(value):
            return self._sum / self._weight if self._weight else math.nan
        self._sum = SMOOTHING * self._sum + (1 - SMOOTHING) * value
        self._weight = SMOOTHING * self._weight + (1 - SMOOTHING)
        return self._sum / self._weight
