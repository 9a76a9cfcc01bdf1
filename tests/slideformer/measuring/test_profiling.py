"""Measuring this machine: what comes out predicts what went in, is kept, and is used."""

from __future__ import annotations

import logging
import stat
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from slideformer import profiles
from slideformer.graph.errors import DeviceError
from slideformer.graph.machines import Machine, load_machine
from slideformer.graph.products import backward_products, forward_products
from slideformer.graph.profile import MachineProfile
from slideformer.graph.rates import ProductRates, RatePoint
from slideformer.graph.tasks import Lane, ProductKind
from slideformer.measuring import lane_rates, product_rates, profiling
from slideformer.measuring.lane_rates import LaneSizes
from slideformer.measuring.product_rates import ProductSizes, layer_config, measure_products
from slideformer.measuring.profiling import LIBRARY_NBYTES, ProfileSizes, measure_machine, sizes_for
from slideformer.measuring.stand_in import Arithmetic, plan_of
from slideformer.measuring.update_rates import COPY_PIECES
from slideformer.models.shapes import SHAPE_NAMES, shape_config
from slideformer.models.units import model_spec
from slideformer.profiles import cached_machine, machine_key, store_machine
from slideformer.this_machine import profile_for

CPU = torch.device("cpu")
SIZES = ProfileSizes(
    ProductSizes((128, 256), (32, 64), (32,), 64, (16, 32), longest=60.0, seconds=0.01),
    LaneSizes(update_numel=8192, copy_nbytes=1 << 16, width=128, tokens=16, seconds=0.05),
    memory_nbytes=1 << 16,
    nvme_nbytes=1 << 23,
    nvme_threads=1,
)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Machine, list[str]]:
    """This machine in small, and what was reported meanwhile."""
    said: list[str] = []
    return measure_machine(CPU, SIZES, [tmp_path_factory.mktemp("nvme")], said.append), said


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setattr(profiles, "cache_folder", lambda: tmp_path)
    return tmp_path


def test_everything_that_exists_is_measured(measured: tuple[Machine, list[str]]) -> None:
    machine, said = measured
    assert len(said) == SIZES.parts + 1
    generic = MachineProfile()
    for rate in ("h2d", "d2h", "flops", "update", "host_copy", "nvme_read", "nvme_write"):
        assert getattr(machine.profile, rate) not in (0.0, getattr(generic, rate))
        assert machine.sources[rate].startswith("measured")
    assert machine.profile.contention.keys() == set(Lane)
    assert all(0 < share <= 1 for share in machine.profile.contention.values())
    assert machine.measured.items() >= machine_key("cpu").items()
    kinds = {
        kind: [(p.width, p.tokens) for p in machine.profile.points if p.kind is kind]
        for kind in ProductKind
    }
    layers = [(128, 32), (128, 64), (256, 32), (256, 64)]
    assert kinds == {
        ProductKind.FORWARD: layers,
        ProductKind.GRADIENT: layers,
        ProductKind.SUMMED: layers,
        ProductKind.ATTENTION: [(128, 32)],
        ProductKind.HEAD: [(128, 16), (128, 32), (256, 16), (256, 32)],
    }


def test_building_the_kernel_is_no_part_of_an_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else so few would follow in the time of a run that no two lanes were at work together."""
    real_update, together, calls, counted = lane_rates.adamw_update, lane_rates._together, [], []

    def update(*arguments: Any) -> None:
        if not calls:
            time.sleep(0.5)
        calls.append(real_update(*arguments))

    def counting(device: torch.device, work: Any) -> Any:
        counted.append({lane: count for lane, (_, count) in work.items()})
        return together(device, work)

    monkeypatch.setattr(lane_rates, "adamw_update", update)
    monkeypatch.setattr(lane_rates, "_together", counting)
    lane_rates.measure_lanes(CPU, SIZES.lanes, threads=1)
    updates = [counts[Lane.CPU] for counts in counted if Lane.CPU in counts]
    assert len(updates) == 2
    assert min(updates) > 10


def test_a_machine_without_nvme_is_assumed_to_have_a_generic_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    point = RatePoint(ProductKind.FORWARD, 1, 1, 1.0)
    monkeypatch.setattr("slideformer.measuring.profiling.measure_products", lambda *_: (point,))
    machine = measure_machine(CPU, SIZES)
    assert machine.profile.nvme_read == MachineProfile().nvme_read
    assert machine.sources["nvme_read"].startswith("assumed")


def test_the_measured_time_is_predicted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention's share is taken out of a layer's time and comes back in its prediction."""
    seconds = iter([3.0, 5.0, 40.0, 90.0, 100.0, 1.0])  # attention, then the layer, then the head
    monkeypatch.setattr(product_rates, "_repeated", lambda *_: next(seconds))
    sizes = ProductSizes((128,), (64,), (64,), 64, (64,), longest=1e9, seconds=0.1)
    rates = ProductRates(1.0, measure_products(CPU, sizes, lambda _: None))
    spec = model_spec(layer_config(128))
    forward = forward_products(spec, spec.layers[0], 1, 64)
    assert rates.seconds(forward) == pytest.approx(40.0)
    for micro_batches, expected in ((1, 90.0), (2, 100.0)):
        plan = plan_of(Arithmetic(micro_batches, 64, 1, 64, "bf16"))
        backward = backward_products(spec, spec.layers[0], plan, kept=False)
        assert rates.seconds(backward) == pytest.approx(expected)


def test_sizes_grow_no_further_than_time_or_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    point = RatePoint(ProductKind.FORWARD, 1, 1, 1.0)
    slow = product_rates._growing(CPU, lambda n: ([point], float(n)), [1, 2, 3, 4], 2.5)
    assert len(list(slow)) == 3

    def large(tokens: int) -> product_rates.Measured:
        if tokens > 2:
            raise torch.OutOfMemoryError
        return [point], 0.0

    assert len(list(product_rates._growing(CPU, large, [1, 2, 3, 4], 2.5))) == 2


@pytest.mark.gpu
def test_a_gpu_is_measured_too() -> None:
    machine = measure_machine(torch.device("cuda", torch.cuda.current_device()), SIZES)
    assert machine.profile.contention.keys() == {Lane.COMPUTE, Lane.H2D, Lane.D2H, Lane.CPU}
    assert machine.profile.gpu_overhead >= LIBRARY_NBYTES + (100 << 20), "a context takes more"
    assert machine.measured["device"] == torch.cuda.get_device_name()


def test_a_profile_is_kept_for_this_machine_alone(
    folder: Path, measured: tuple[Machine, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cached_machine("cpu") is None
    path = store_machine("cpu", measured[0])
    assert path.parent == folder
    assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0
    assert cached_machine("cpu") == measured[0]
    assert cached_machine() == (None if torch.cuda.is_available() else measured[0])
    assert list(folder.iterdir()) == [path], "nothing is left beside it"
    monkeypatch.setattr(torch, "__version__", "0.0.1")
    assert cached_machine("cpu") is None


def test_planning_uses_it_and_says_so(
    folder: Path, measured: tuple[Machine, list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "slideformer")
    assert profile_for(CPU) == replace(MachineProfile(), gpu_overhead=0)
    assert caplog.text == ""
    store_machine("cpu", measured[0])
    assert profile_for(CPU) == replace(measured[0].profile, gpu_overhead=0)
    assert caplog.text.count("Predicting for this machine") == 1


def test_a_broken_file_is_passed_over_with_a_warning(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store_machine("cpu", load_machine("h100")).write_text("{")
    assert cached_machine("cpu") is None
    assert "measure again with `slideformer profile`" in caplog.text


def test_a_cache_that_cannot_be_written_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(profiles, "cache_folder", lambda: tmp_path / "missing")
    with pytest.raises(DeviceError, match=r"cannot be kept .*--output"):
        store_machine("cpu", load_machine("h100"))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("room", [1 << 30, 4 << 30, 32 << 30, 512 << 30])
def test_what_is_measured_fits_the_memory_that_is_free(
    room: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiling, "available_host_memory", lambda: room)
    sizes = sizes_for(torch.device(device))
    walked = lane_rates.WALKED_BYTES * sizes.lanes.update_numel
    pinned = 2 * COPY_PIECES * sizes.lanes.copy_nbytes
    assert walked + pinned + 2 * sizes.memory_nbytes <= room


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_shapes_that_are_measured_are_those_of_no_model(device: str) -> None:
    sizes = sizes_for(torch.device(device))
    models = [shape_config(name) for name in SHAPE_NAMES]
    layers = [layer_config(width) for width in sizes.products.widths]
    assert {(c.hidden_size, c.intermediate_size) for c in models}.isdisjoint(
        (c.hidden_size, c.intermediate_size) for c in layers
    )
    assert sizes.parts == 3 + sum(
        map(len, (sizes.products.sequences, sizes.products.widths, sizes.products.widths[:2]))
    )
