"""Durations from costs, alone and beside other work."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from slideformer.graph.errors import ConfigError
from slideformer.graph.profile import MachineProfile
from slideformer.graph.rates import RatePoint
from slideformer.graph.tasks import Cost, Lane, Product, ProductKind, Task, TaskKind

PROFILE = MachineProfile(
    h2d=1e9,
    d2h=2e9,
    flops=1e12,
    update=1e8,
    nvme_read=1e6,
    nvme_write=2e6,
    launch=0.5,
    handover=0.25,
)


@pytest.mark.parametrize(
    ("kind", "cost", "seconds"),
    [
        (TaskKind.H2D, Cost(nbytes=3_000_000_000), 3.5),
        (TaskKind.D2H, Cost(nbytes=3_000_000_000), 2.0),
        (TaskKind.COMPUTE, Cost(flops=2_000_000_000_000), 2.5),
        (TaskKind.CPU_UPDATE, Cost(params=100_000_000), 1.75),
        (TaskKind.NVME_READ, Cost(nbytes=1_000_000), 1.75),
        (TaskKind.SAVE, Cost(nbytes=1_000_000), 1.25),
        (TaskKind.COMPUTE, Cost(), 0.5),
        (
            TaskKind.COMPUTE,
            Cost(products=(Product(ProductKind.FORWARD, 10**12, 512, 8),) * 2),
            0.5 + 2 * 2,
        ),
        (TaskKind.COMPUTE, Cost(flops=10**15, seconds=0.25), 0.25),
    ],
)
def test_seconds_of_a_task(kind: TaskKind, cost: Cost, seconds: float) -> None:
    assert PROFILE.seconds(Task("a.x", kind, "a", cost=cost)) == pytest.approx(seconds)


@pytest.mark.parametrize("kind", TaskKind)
def test_every_kind_has_a_rate(kind: TaskKind) -> None:
    short, long = (Task("a.x", kind, "a", cost=Cost(nbytes=n)) for n in (1 << 20, 1 << 30))
    profile = MachineProfile()
    assert profile.launch < profile.seconds(short) < profile.seconds(long)


def test_lanes_slow_each_other_down() -> None:
    up, down, cpu, compute = Lane.H2D, Lane.D2H, Lane.CPU, Lane.COMPUTE
    profile = MachineProfile(contention={up: 0.64, cpu: 0.49, compute: 0.125})
    assert profile.speed(up, {up, compute}) == 1.0
    assert profile.speed(up, {up, down}) == pytest.approx(0.8)
    assert profile.speed(up, {up, down, cpu}) == pytest.approx(0.64)
    assert profile.speed(cpu, {cpu, compute, up}) == pytest.approx(0.7)
    assert profile.speed(cpu, {cpu, up, down}) == pytest.approx(0.49)
    assert profile.speed(compute, {compute, cpu}) == pytest.approx(0.5)
    assert profile.speed(down, set(Lane)) == 1.0


def test_a_shared_machine_has_lost_half_of_what_it_can_lose() -> None:
    points = (RatePoint(ProductKind.FORWARD, 8, 8, 100.0),)
    contention = {Lane.COMPUTE: 0.81, Lane.H2D: 0.64, Lane.CPU: 0.25, Lane.NVME_READ: 0.49}
    shared = replace(PROFILE, points=points, contention=contention).shared
    assert shared.flops == pytest.approx(0.9e12)
    assert shared.products.rate(ProductKind.FORWARD, 8, 8) == pytest.approx(90.0)
    assert (shared.h2d, shared.d2h) == (pytest.approx(0.8e9), 2e9)
    assert (shared.update, shared.nvme_read) == (pytest.approx(0.5e8), pytest.approx(0.7e6))
    assert shared.contention == {}
    assert PROFILE.shared == PROFILE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nvme_read": 0.0}, "machine 'generic': nvme_read is 0.0; it must be above 0"),
        ({"h2d": -1e9}, "h2d is -1000000000.0; it must be above 0"),
        ({"flops": math.nan}, "flops is nan"),
        ({"launch": -1.0}, r"launch is -1.0; it must be from 0 to 1e\+20 seconds"),
        ({"handover": math.inf}, "handover is inf"),
        ({"contention": {Lane.CPU: 0.0}}, "contention of cpu is 0.0; it must be above 0 and at m"),
        ({"contention": {Lane.H2D: 1.5}}, "contention of h2d is 1.5"),
        ({"widths": {Lane.CPU: 0}}, "width of cpu is 0; it must be at least 1"),
    ],
)
def test_a_machine_that_cannot_be_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MachineProfile(**change)
