"""Learning-rate schedules: the rate of every step of a run, known before its first one.

Steps count from 1; the first of a warm-up has the rate 0. The values are those of the
``get_*_schedule`` functions of transformers 5: linear, cosine and cosine with hard restarts (with
a floor as in ``get_cosine_with_min_lr_schedule_with_warmup``) and ``get_wsd_schedule``, whose
decay is a cosine and whose warm-up begins at the floor.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from slideformer.config import Config
from slideformer.graph.errors import ConfigError

Schedule = Callable[[int], float]
"""The learning rate of a step, counted from 1: finite and not negative. Asked once for each step
of a run, in order and before memory is allocated, so it cannot depend on losses."""


MOST_STEPS = 10**7
"""Steps of a run: all their rates are held in memory."""


def learning_rates(config: Config, steps: int, schedule: Schedule | None = None) -> list[float]:
    """The learning rates of a run of ``steps`` steps; ``schedule`` replaces the configured one.

    Raises `ConfigError` if the run has more than `MOST_STEPS`, the parts of the schedule are longer
    than the run, or a rate is negative or not finite.
    """
    if steps > MOST_STEPS:
        raise ConfigError(
            f"the run has {steps} steps, more than the {MOST_STEPS} that a schedule is made for; "
            "use fewer steps or epochs"
        )
    chosen = schedule or _configured(config, steps)
    rates = [float(chosen(step)) for step in range(1, steps + 1)]
    for step, rate in enumerate(rates, start=1):
        if not 0.0 <= rate < math.inf:
            raise ConfigError(
                f"the schedule gives step {step} the learning rate {rate}; it must be finite and "
                "not negative"
            )
    return rates


def _configured(config: Config, steps: int) -> Schedule:
    """The schedule that ``config`` describes, for a run of ``steps`` steps."""
    warmup, decay = config.warmup_steps, config.decay_steps or 0
    if warmup + max(decay, 1) > steps:
        parts = f"warmup_steps is {warmup}" + (f" and decay_steps is {decay}" if decay else "")
        raise ConfigError(
            f"{parts}, but the run has {steps} steps; the learning rate would never come to where "
            "it should, so use fewer"
        )
    peak, floor = config.lr, config.min_lr
    start = floor if config.schedule == "wsd" else 0.0
    shape, total = _shape(config), steps - warmup

    def rate(step: int) -> float:
        done = step - 1
        if done < warmup:
            return start + (peak - start) * done / warmup
        return floor + (peak - floor) * shape(done - warmup, total)

    return rate


def _shape(config: Config) -> Callable[[int, int], float]:
    """From steps done since the warm-up, and all those after it, to the share of the peak."""
    if config.schedule == "constant":
        return lambda _done, _total: 1.0
    if config.schedule == "linear":
        return lambda done, total: 1.0 - done / total
    if config.schedule == "cosine":
        return lambda done, total: _cosine(done / total)
    if config.schedule == "cosine-restarts":
        cycles = config.cycles or 1
        return lambda done, total: _cosine(cycles * done / total % 1.0)
    decay = config.decay_steps or 0
    return lambda done, total: _cosine(max(0, done - (total - decay)) / decay)


def _cosine(progress: float) -> float:
    """From 1 to 0 along half a cosine."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))
