"""Schedules equal those of transformers; what cannot be a schedule is refused before training."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from slideformer.config import Config
from slideformer.graph.errors import ConfigError
from slideformer.schedule import learning_rates

LR = 3e-4


def config(**settings: Any) -> Config:
    return Config(model="m", data="d.jsonl", output="o", **{"lr": LR, **settings})


def reference(make: Callable[..., Any], steps: int, **settings: Any) -> list[float]:
    """Learning rates of an optimizer under a scheduler of transformers."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    scheduler = make(optimizer, **settings)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def check(ours: list[float], theirs: list[float]) -> None:
    assert ours == pytest.approx(theirs, rel=1e-12, abs=1e-12 * LR)


lengths = st.integers(2, 60).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n - 1)))
floors = st.sampled_from([0.0, 0.1, 1.0])


@given(lengths)
def test_constant(length: tuple[int, int]) -> None:
    steps, warmup = length
    ours = learning_rates(config(warmup_steps=warmup), steps)
    make = transformers.get_constant_schedule_with_warmup
    check(ours, reference(make, steps, num_warmup_steps=warmup))


@given(lengths, floors)
def test_linear(length: tuple[int, int], floor: float) -> None:
    steps, warmup = length
    ours = learning_rates(config(schedule="linear", warmup_steps=warmup, min_lr=floor * LR), steps)
    sizes = {"num_warmup_steps": warmup, "num_training_steps": steps}
    if floor == 0:
        make = transformers.get_linear_schedule_with_warmup
        check(ours, reference(make, steps, **sizes))
    elif floor < 1:
        make = transformers.get_polynomial_decay_schedule_with_warmup
        check(ours, reference(make, steps, **sizes, lr_end=floor * LR, power=1.0))


@given(lengths, floors)
def test_cosine(length: tuple[int, int], floor: float) -> None:
    steps, warmup = length
    ours = learning_rates(config(schedule="cosine", warmup_steps=warmup, min_lr=floor * LR), steps)
    make = transformers.get_cosine_with_min_lr_schedule_with_warmup
    check(
        ours,
        reference(
            make, steps, num_warmup_steps=warmup, num_training_steps=steps, min_lr=floor * LR
        ),
    )


@given(lengths, st.integers(1, 4))
def test_cosine_with_restarts(length: tuple[int, int], cycles: int) -> None:
    steps, warmup = length
    ours = learning_rates(
        config(schedule="cosine-restarts", warmup_steps=warmup, cycles=cycles), steps
    )
    make = transformers.get_cosine_with_hard_restarts_schedule_with_warmup
    sizes = {"num_warmup_steps": warmup, "num_training_steps": steps}
    check(ours, reference(make, steps, **sizes, num_cycles=cycles))


@given(lengths, st.integers(1, 20), floors)
def test_wsd(length: tuple[int, int], decay: int, floor: float) -> None:
    stable, warmup = length[0] - 2, length[1]
    steps = warmup + stable + decay
    settings = config(schedule="wsd", warmup_steps=warmup, decay_steps=decay, min_lr=floor * LR)
    theirs = reference(
        transformers.get_wsd_schedule,
        steps,
        num_warmup_steps=warmup,
        num_stable_steps=stable,
        num_decay_steps=decay,
        min_lr_ratio=floor,
    )
    check(learning_rates(settings, steps), theirs)


def test_any_callable_is_a_schedule() -> None:
    assert learning_rates(config(), 3, lambda step: 0.5**step) == [0.5, 0.25, 0.125]


def test_a_run_too_long_for_memory_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="the run has 1000000000 steps, more than the 10000000"):
        learning_rates(config(), 10**9)


@pytest.mark.parametrize("rate", [-1e-9, math.nan, math.inf])
def test_a_rate_that_is_none_is_refused_before_the_first_step(rate: float) -> None:
    with pytest.raises(ConfigError, match=f"step 3 the learning rate {rate}; it must be finite"):
        learning_rates(config(), 4, lambda step: rate if step == 3 else 1e-5)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"warmup_steps": 5}, "warmup_steps is 5, but the run has 5 steps"),
        (
            {"schedule": "wsd", "warmup_steps": 2, "decay_steps": 4},
            "warmup_steps is 2 and decay_steps is 4, but the run has 5 steps",
        ),
    ],
)
def test_parts_longer_than_the_run_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        learning_rates(config(**settings), 5)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"schedule": "step"}, "'cosine-restarts'"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
        ({"schedule": "cosine", "min_lr": 1.0}, "min_lr is 1.0, above lr 0.0003"),
        ({"min_lr": 1e-5}, "schedule is constant; choose one that goes down"),
        ({"schedule": "cosine-restarts"}, "cycles is not set and schedule is cosine-restarts"),
        ({"schedule": "cosine", "cycles": 2}, "cycles is 2 and schedule is cosine"),
        ({"schedule": "wsd"}, "decay_steps is not set and schedule is wsd"),
        ({"decay_steps": 3}, "decay_steps is 3 and schedule is constant"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config(**settings)
