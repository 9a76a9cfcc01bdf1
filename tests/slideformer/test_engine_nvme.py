"""State, weights and boundaries on NVMe: bits, saves and evaluations as without."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slideformer import planning
from slideformer.config import EngineConfig
from slideformer.engine import Engine
from slideformer.graph.errors import CheckpointError, ConfigError, StoreError
from slideformer.graph.plan import Budgets
from slideformer.graph.profile import MachineProfile
from slideformer.graph.step import footprint
from slideformer.models.families import read_model_config
from slideformer.runtime import nvme
from slideformer.runtime.policies import policy_names
from tests.support.engines import (
    config_for,
    different,
    engine_with,
    make_batch,
    state_of,
    stored_weights,
    write_model,
)

LAYERS = 3
BATCHES = [make_batch(seed) for seed in range(3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with padding between operands."""
    return write_model(tmp_path_factory.mktemp("model"), "qwen2", tied=False)


@pytest.fixture(scope="module")
def disks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two folders to stripe over."""
    return tmp_path_factory.mktemp("disk"), tmp_path_factory.mktemp("disk")


def train(
    folder: Path,
    nvme: tuple[Path, ...],
    compute: str = "bf16",
    *,
    policy: str = "fifo",
    max_grad_norm: float | None = None,
    **plan: Any,
) -> dict[str, Tensor]:
    """Three steps, submitted before the first is read, with an evaluation between."""
    config = config_for(
        folder,
        compute=compute,
        policy=policy,
        nvme=nvme,
        weight_decay=0.1,
        max_grad_norm=max_grad_norm,
    )
    with engine_with(config, **plan) as engine:
        engine.step(BATCHES[0])
        evaluation = engine.evaluate(BATCHES[1])
        for batch in BATCHES[1:]:
            engine.step(batch)
        return {**state_of(engine), "loss": torch.tensor([evaluation.loss()])}


@pytest.fixture(scope="module")
def plain(folder: Path) -> dict[str, dict[str, Tensor]]:
    """What becomes of the model with all state in host memory."""
    return {compute: train(folder, (), compute) for compute in ("bf16", "fp32")}


@st.composite
def placements(draw: st.DrawFn) -> dict[str, Any]:
    """How much is on NVMe, and all that decides when it is read."""
    moments = draw(st.integers(1, LAYERS))
    compute = draw(st.sampled_from(["bf16", "bf16", "fp32"]))
    lo = draw(st.integers(0, moments)) if compute == "bf16" else 0
    offloaded = draw(st.integers(1, LAYERS))
    deferred = draw(st.booleans())  # with a limit that no norm reaches
    return {
        "max_grad_norm": 1e9 if deferred else None,
        "compute": compute,
        "nvme_moments": moments,
        "nvme_lo": lo,
        "nvme_hi": draw(st.integers(0, lo)),
        "offloaded": offloaded,
        "nvme_boundaries": draw(st.integers(0, offloaded - 1)),
        "nvme_direct": draw(st.booleans()),
        "boundary_slots": draw(st.sampled_from([None, 9])),
        "nvme_slots": draw(st.integers(1, 4)),
        "chunk_numel": draw(st.sampled_from([500, 3000, 1 << 25])),
        "policy": draw(st.sampled_from(policy_names())),
        "gradient_slots": 0 if deferred else draw(st.integers(0, 2)),
        "window": draw(st.integers(2, 3)),
        "resident": draw(st.sampled_from([(), ("embed", "L00")])) if compute == "bf16" else (),
    }


@settings(max_examples=12)
@given(placement=placements(), folders=st.integers(1, 2))
def test_state_on_nvme_is_the_same_bits(
    folder: Path,
    disks: tuple[Path, Path],
    plain: dict[str, dict[str, Tensor]],
    placement: dict[str, Any],
    folders: int,
) -> None:
    placement["resident"] = frozenset(placement["resident"])
    outcome = train(folder, disks[:folders], **placement)
    assert different(outcome, plain[placement["compute"]]) == []
    assert [list(disk.iterdir()) for disk in disks] == [[], []], "files are removed at the end"


def test_state_on_nvme_is_not_in_memory(folder: Path, disks: tuple[Path, Path]) -> None:
    """So that equal bits mean something."""
    with engine_with(
        config_for(folder, compute="bf16", nvme=disks), nvme_moments=3, nvme_lo=2, nvme_hi=1
    ) as engine:
        states = engine._memory.states
        for part, count in (("m", 3), ("lo", 2), ("hi", 1)):
            assert [len(getattr(states[f"L0{i}"], part)) for i in range(LAYERS)].count(0) == count
        (file,) = disks[0].glob("*.nvme")
        assert file.stat().st_mode & 0o777 == 0o600
        before = file.read_bytes()
        engine.step(BATCHES[0]).wait()
        assert file.read_bytes() != before, "moments are on the disk"


def test_a_model_with_its_state_on_nvme_is_saved_as_any_other(
    folder: Path, disks: tuple[Path, Path], tmp_path: Path
) -> None:
    """In FP32, so that the lower halves count; before the first step, and after some."""

    def saved(name: str, nvme: tuple[Path, ...], **plan: Any) -> list[dict[str, Tensor]]:
        found = []
        with engine_with(config_for(folder, compute="bf16", nvme=nvme), **plan) as engine:
            for number, batch in enumerate(BATCHES[:2]):
                engine.save(tmp_path / f"{name}{number}")
                found.append(stored_weights(tmp_path / f"{name}{number}"))
                engine.step(batch)
        return found

    everything = {f"nvme_{part}": LAYERS for part in ("moments", "lo", "hi")}
    ours = saved("ours", disks, **everything, chunk_numel=3000)
    reference = saved("reference", ())
    for one, other in zip(ours, reference, strict=True):
        assert different(one, other) == []
    assert different(ours[0], ours[1])


def test_boundaries_go_straight_where_the_gpu_and_nvme_exchange_bytes(folder: Path) -> None:
    config, budgets = config_for(folder, compute="bf16"), Budgets(1 << 30, 1 << 33, 1 << 30)
    hf_config = read_model_config(folder)
    for direct in (False, True):
        profile = MachineProfile(gpu_overhead=0, direct_storage=direct)
        plan = planning.plan_for(hf_config, config, budgets, profile)
        assert plan.nvme_direct == direct
        plan = replace(plan, offloaded=LAYERS, nvme_boundaries=1, boundary_slots=None)
        wanted = footprint(planning.spec_for(hf_config, config), plan)
        assert any(name.startswith("xs.") for name in wanted) != direct


# Faults

FAULTY = {
    "nvme_moments": 2,
    "nvme_lo": 2,
    "nvme_hi": 1,
    "offloaded": LAYERS,
    "nvme_boundaries": 1,
    "chunk_numel": 3000,
}
"""Something of every kind on NVMe."""


def paths_of(engine: Engine) -> list[Path]:
    """The files of its store."""
    assert engine._memory.store is not None
    return engine._memory.store.paths


def train_on(engine: Engine) -> None:
    """More steps than any fault of these tests takes to show."""
    for batch in BATCHES * 2:
        engine.step(batch).wait()


def trained_until_it_fails(config: EngineConfig, output: Path, harm: Any) -> str:
    """Save, do harm, and train until that shows; returns the message. The output stays whole."""
    with engine_with(config, **FAULTY) as engine:
        engine.step(BATCHES[0])
        engine.save(output)
        before = stored_weights(output)
        harm(engine)
        with pytest.raises(StoreError) as caught:
            train_on(engine)
        with pytest.raises(CheckpointError, match="a step failed"):
            engine.save(output.with_name("other"))
    assert different(stored_weights(output), before) == []
    assert list(output.parent.iterdir()) == [output]
    assert [list(disk.iterdir()) for disk in config.nvme] == [[]] * len(config.nvme)
    return str(caught.value)


@settings(max_examples=4)
@given(after=st.integers(0, 60))
def test_a_disk_that_fills_at_any_write_fails_the_step(
    folder: Path, disks: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory, after: int
) -> None:
    calls = 0
    original = os.pwritev

    def write(*args: Any) -> int:
        nonlocal calls
        calls += 1
        if calls > after:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*args)

    with pytest.MonkeyPatch.context() as patch:
        message = trained_until_it_fails(
            config_for(folder, compute="bf16", nvme=disks),
            tmp_path_factory.mktemp("out") / "model",
            lambda _: patch.setattr(nvme.os, "pwritev", write),
        )
    assert message.startswith(("write.L0", "write.x.L0"))
    assert "the disk is full" in message
    assert str(disks[0]) in message or str(disks[1]) in message


def test_a_corrupted_extent_fails_the_step_that_reads_it(
    folder: Path, disks: tuple[Path, Path], tmp_path: Path
) -> None:
    def corrupt(engine: Engine) -> None:
        engine.synchronize()
        for path in paths_of(engine):
            path.write_bytes(bytes(byte ^ 1 for byte in path.read_bytes()))

    config = config_for(folder, compute="bf16", nvme=disks)
    message = trained_until_it_fails(config, tmp_path / "model", corrupt)
    assert message.startswith("read.L0")
    assert "are not those that were written" in message


def refuse(name: str, code: int) -> Callable[[Engine, pytest.MonkeyPatch], None]:
    """From now on a system call fails with that error."""

    def harm(_: Engine, patch: pytest.MonkeyPatch) -> None:
        def call(*_: Any) -> int:
            raise OSError(code, os.strerror(code))

        patch.setattr(nvme.os, name, call)

    return harm


def take_away(engine: Engine, _: pytest.MonkeyPatch) -> None:
    """The files' names go, as with their folder."""
    for path in paths_of(engine):
        path.unlink()


def cut(engine: Engine, _: pytest.MonkeyPatch) -> None:
    """The files end early."""
    engine.synchronize()
    for path in paths_of(engine):
        os.truncate(path, 4096)


HARMS: dict[str, tuple[Callable[[Engine, pytest.MonkeyPatch], None], str]] = {
    "failing disk": (refuse("preadv", errno.EIO), "Input/output error"),
    "read-only": (refuse("pwritev", errno.EROFS), "Read-only file system"),
    "vanished": (take_away, "the file, or its folder, has been removed"),
    "cut": (cut, "bytes are there; it was cut"),
}


@pytest.mark.parametrize("name", HARMS)
def test_a_fault_fails_the_step_and_names_extent_and_path(
    folder: Path, disks: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    harm, reason = HARMS[name]
    with pytest.MonkeyPatch.context() as patch:
        message = trained_until_it_fails(
            config_for(folder, compute="bf16", nvme=disks),
            tmp_path / "model",
            lambda engine: harm(engine, patch),
        )
    assert re.search(rf"{disks[0].parent}.*slideformer-.*extent .*{reason}", message), message


def test_a_disk_that_fails_while_the_weights_are_loaded_leaves_nothing(
    folder: Path, disks: tuple[Path, Path]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        refuse("pwritev", errno.ENOSPC)(None, patch)  # type: ignore[arg-type]
        with (
            pytest.raises(StoreError, match=r"extent hi\.L0.*the disk is full"),
            engine_with(config_for(folder, compute="bf16", nvme=disks), **FAULTY),
        ):
            pass
    assert [list(disk.iterdir()) for disk in disks] == [[], []]


def test_a_slow_disk_is_named_and_changes_no_bit(
    folder: Path,
    disks: tuple[Path, Path],
    plain: dict[str, dict[str, Tensor]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    original = os.preadv

    def read(*args: Any) -> int:
        time.sleep(0.002)
        return original(*args)

    monkeypatch.setattr(nvme.os, "preadv", read)
    monkeypatch.setattr(nvme, "_SAMPLE", 1 << 16)
    outcome = train(folder, disks, **FAULTY)
    assert different(outcome, plain["bf16"]) == []
    slow = [r.getMessage() for r in caplog.records if "NVMe is slow" in r.getMessage()]
    assert [message for message in slow if "reads of" in message and str(disks[0]) in message]
    assert len(slow) <= 2, "each direction is reported once"


def test_a_killed_run_leaves_files_until_the_next_start(
    folder: Path, disks: tuple[Path, Path], tmp_path: Path
) -> None:
    program = tmp_path / "run.py"
    program.write_text(KILLED)
    output = tmp_path / "model"
    command = [sys.executable, str(program), str(folder), str(output), *map(str, disks)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "saved\n"
        saved = stored_weights(output)
        run.send_signal(signal.SIGKILL)
    left = [path for disk in disks for path in disk.glob("*.nvme")]
    assert len(left) == 2
    with engine_with(config_for(folder, compute="bf16", nvme=disks), **FAULTY) as engine:
        assert not any(path.exists() for path in left)
        engine.step(BATCHES[0]).wait()
    assert [list(disk.iterdir()) for disk in disks] == [[], []]
    assert different(stored_weights(output), saved) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "run.py"]


KILLED = """
import sys
from pathlib import Path
from tests.slideformer.test_engine_nvme import BATCHES, FAULTY, config_for, engine_with
folder, output, *disks = map(Path, sys.argv[1:])
with engine_with(config_for(folder, compute="bf16", nvme=tuple(disks)), **FAULTY) as engine:
    engine.step(BATCHES[0])
    engine.save(output)
    print("saved", flush=True)
    while True:
        engine.step(BATCHES[1])
"""


def test_a_plan_on_nvme_without_a_folder_is_refused(folder: Path) -> None:
    with (
        pytest.raises(ConfigError, match="name a folder with --nvme"),
        engine_with(config_for(folder), nvme_moments=1),
    ):
        pass
