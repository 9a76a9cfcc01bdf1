"""Machine profiles: all that ship load and are plausible; what is wrong with a file is named."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from slideformer.graph.errors import ConfigError
from slideformer.graph.machines import load_machine, machine_names, parse_machine, write_machine
from slideformer.graph.profile import MachineProfile
from slideformer.graph.rates import RatePoint
from slideformer.graph.tasks import Cost, Lane, ProductKind, Task, TaskKind

SHIPPED = ("a100", "h100", "h200", "mi300x", "rtx3090", "rtx4090", "rtx5090")


def text_of(name: str) -> str:
    """The file that ships under that name."""
    return (resources.files("slideformer.graph") / "data" / f"{name}.json").read_text("utf-8")


def test_the_machines_that_ship() -> None:
    assert machine_names() == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_a_machine_is_plausible_and_every_rate_has_a_source(name: str) -> None:
    machine = load_machine(name)
    profile = machine.profile
    assert profile.name == name
    assert 10e9 < profile.h2d < 64e9
    assert 10e9 < profile.d2h < 64e9
    assert 50e12 < profile.flops < 1000e12
    assert 1e9 < profile.update < profile.host_copy / 20
    assert 20 << 30 < machine.gpu_memory <= 192 << 30
    rates = MachineProfile.__dataclass_fields__.keys() - {
        *("name", "gpu_overhead", "host_overhead", "widths", "points", "contention"),
        "direct_storage",
    }
    assert machine.sources.keys() >= rates
    for source in machine.sources.values():
        assert source.split(":")[0] in ("measured", "derated", "assumed")
        assert len(source.split()) > 3


def test_rates_become_durations() -> None:
    slow, fast = load_machine("rtx3090").profile, load_machine("h200").profile
    copy = Task("h2d.x", TaskKind.H2D, "copy", cost=Cost(nbytes=55 * 10**9))
    assert fast.seconds(copy) == pytest.approx(1.0, rel=1e-3)
    assert slow.seconds(copy) > 1.9


def test_a_file_is_a_machine_too(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(text_of("a100").replace('"a100"', '"mine"'))
    assert load_machine(str(path)).profile.name == "mine"


def test_a_measured_machine_reads_back() -> None:
    known = load_machine("h100")
    points = (RatePoint(ProductKind.SUMMED, 2048, 512, 1.5e14),)
    profile = replace(
        known.profile,
        points=points,
        contention=dict.fromkeys(Lane, 0.8),
        gpu_overhead=123 << 20,
    )
    shares = dict.fromkeys((f"contention.{lane}" for lane in Lane), "measured: here")
    machine = replace(
        known, profile=profile, sources={**known.sources, **shares}, measured={"torch": "2.11"}
    )
    assert parse_machine(write_machine(machine), "mine") == machine


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rtx490", r"unknown machine 'rtx490'; did you mean rtx\d090 or rtx\d090\?"),
        ("H200", r"did you mean h200"),
        ("abacus", r"unknown machine 'abacus'; .*known: a100, .*or a \.json file"),
        ("/nowhere/x.json", r"/nowhere/x\.json: cannot be read: No such file"),
        ("../data/h200", r"unknown machine"),
    ],
)
def test_an_unknown_machine_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_machine(name)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["version"], 1, r"m\.json: has version 1, this program reads version 2"),
        (["rates", "h2d", "value"], 0, r"m\.json: rates\.h2d\.value is 0"),
        (["rates", "h2d", "value"], -1.0, r"rates\.h2d\.value is -1"),
        (["rates", "h2d", "value"], "fast", r"rates\.h2d\.value is 'fast'"),
        (["rates", "h2d", "source"], "", r"rates\.h2d\.source is ''"),
        (["rates", "h3d"], 1, r"rates\.h3d is 1: Extra inputs"),
        (["rates", "update"], ..., r"rates\.update: Field required"),
        (["contention", "h2d", "value"], 1.5, r"contention\.h2d\.value is 1\.5"),
        (["gpu_memory"], 1 << 70, r"gpu_memory is"),
    ],
)
def test_a_broken_file_is_refused(path: list[str], value: Any, message: str) -> None:
    document = json.loads(text_of("h100"))
    inner = document
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    if value is ...:
        del inner[path[-1]]
    with pytest.raises(ConfigError, match=message):
        parse_machine(json.dumps(document), "m.json")


def test_text_that_is_no_json_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"m\.json: file is 'rates: 1': Invalid JSON"):
        parse_machine("rates: 1", "m.json")
