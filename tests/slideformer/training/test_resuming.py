"""A run that is stopped, or killed, and resumed ends in the same files as one that never was."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import time
from collections import namedtuple
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

from slideformer import engine as engine_module
from slideformer.checkpointing import Checkpoint
from slideformer.config import Config, load_config
from slideformer.engine import Engine
from slideformer.graph.errors import (
    BudgetError,
    CheckpointError,
    ConfigError,
    DataError,
    StoreError,
    TaskError,
)
from slideformer.graph.plan import MemoryPlan
from slideformer.models import aside
from slideformer.models.data.sources import Source
from slideformer.numerics import PLACEMENT
from slideformer.runtime import nvme
from slideformer.traces import GRAPH_FILE, TRACE_FILE
from slideformer.trainer import Trainer
from slideformer.training import checkpoints as checkpoints_module
from slideformer.training.checkpoints import checkpoints_folder, find_checkpoint
from slideformer.training.reports import (
    CONFIG_FILE,
    METRICS_FILE,
    NUMERICS_FILE,
    PLAN_FILE,
    RunStart,
    StepMetrics,
)
from tests.support.checkpoints import SEQ_LEN, write_checkpoint, write_text
from tests.support.specs import draft

STEPS = 9
KILLS = int(os.environ.get("SLIDEFORMER_KILLS", "6"))
"""How often a run is killed; in CI a few times."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("data") / "text.txt")


def run_config(model: Path, data: Path, output: Path, **settings: Any) -> Config:
    """Nine steps with a schedule, a checkpoint after every second one."""
    fields = {
        **{"model": model, "data": data, "output": output, "steps": STEPS},
        **{"batch_size": 2, "seq_len": SEQ_LEN, "lr": 1e-3, "device": "cpu", "threads": 1},
        **{"schedule": "cosine", "warmup_steps": 2, "checkpoint_every": 2},
    }
    return load_config(None, {**fields, **settings})


@pytest.fixture
def config(model: Path, data: Path, tmp_path: Path) -> Config:
    return run_config(model, data, tmp_path / "out")


@pytest.fixture(scope="module")
def plain(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run without interruption, and without checkpoints."""
    output = tmp_path_factory.mktemp("plain") / "out"
    result = Trainer(run_config(model, data, output, checkpoint_every=None)).train()
    assert not result.interrupted, "somebody sent this process a signal"
    return output


class Stopper:
    """A progress that raises a signal, or an error, after some step."""

    def __init__(self, after: int, do: Any = lambda: signal.raise_signal(signal.SIGINT)) -> None:
        self.run: RunStart | None = None
        self.steps: list[int] = []
        self._after, self._do = after, do

    def start(self, run: RunStart) -> None:
        self.run = run

    def step(self, metrics: StepMetrics) -> None:
        self.steps.append(metrics.step)
        if metrics.step == self._after:
            self._do()

    def finish(self) -> None:
        pass


def same(output: Path, plain: Path) -> None:
    """Weights equal bit for bit, metrics but for the time, each step once."""
    assert names(output) == names(plain)
    told = {CONFIG_FILE, METRICS_FILE, PLAN_FILE, GRAPH_FILE, TRACE_FILE, NUMERICS_FILE}
    assert rounding(output) == rounding(plain)
    for name in set(names(plain)) - told:
        assert (output / name).read_bytes() == (plain / name).read_bytes(), name
    ours, theirs = (
        [{**json.loads(line), "seconds": 0} for line in text.splitlines()]
        for text in ((each / METRICS_FILE).read_text() for each in (output, plain))
    )
    assert ours == theirs


def rounding(output: Path) -> dict[str, str | int]:
    """What decided a run's rounding, as it says."""
    numerics = json.loads((output / NUMERICS_FILE).read_text())
    return {name: value for name, value in numerics.items() if name not in PLACEMENT}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def steps_of(config: Config) -> list[str]:
    return names(checkpoints_folder(config.output))


def test_checkpoints_change_nothing_and_the_last_ones_are_kept(config: Config, plain: Path) -> None:
    result = Trainer(config).train()
    same(config.output, plain)
    assert steps_of(config) == ["step-6", "step-8"]
    assert result.checkpoint == checkpoints_folder(config.output) / "step-8"
    assert names(config.output.parent) == ["out", "out-checkpoints"]


def test_ctrl_c_leaves_a_checkpoint_and_a_model_and_resume_goes_on(
    config: Config, plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config.model_copy(update={"checkpoint_every": None})
    result = Trainer(config).train(Stopper(after=3))
    assert result.interrupted
    assert result.steps == 4, "the fourth was in flight when the third was read"
    assert (result.checkpoint, steps_of(config)) == (
        find_checkpoint(config.output).folder,
        ["step-4"],
    )
    assert (config.output / "model.safetensors.index.json").is_file()

    monkeypatch.chdir(config.output.parent)
    progress = Stopper(after=0)
    result = Trainer.resume("out", {"window": 3, "policy": "fifo", "threads": 2}).train(progress)
    assert progress.run is not None
    assert (progress.run.steps, progress.run.done) == (STEPS, 4)
    assert progress.steps == [5, 6, 7, 8, 9]
    assert (result.steps, result.interrupted, result.output) == (STEPS, False, config.output)
    same(config.output, plain)
    assert names(config.output.parent) == ["out", "out-checkpoints"]
    with pytest.raises(CheckpointError, match=r"the result of 9 steps, .*step-4 is of 4: nothing"):
        Trainer.resume(config.output).train()


def test_a_run_can_be_stopped_and_resumed_again_and_again(config: Config, plain: Path) -> None:
    Trainer(config).train(Stopper(after=1))
    Trainer.resume(config.output).train(Stopper(after=4))
    Trainer.resume(config.output).train(Stopper(after=7))
    assert steps_of(config) == ["step-6", "step-8"], "the eighth is the one that Ctrl-C leaves"
    Trainer.resume(config.output).train()
    same(config.output, plain)


def test_what_a_killed_run_had_no_time_to_discard_is_discarded_by_the_resumed_one(
    config: Config, plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as killed_before:
        killed_before.setattr(checkpoints_module, "discard", lambda path: None)
        Trainer(config).train(Stopper(after=7))
    assert steps_of(config) == ["step-2", "step-4", "step-6", "step-8"]
    Trainer.resume(config.output).train()
    same(config.output, plain)
    assert steps_of(config) == ["step-6", "step-8"]


def test_relative_paths_mean_the_same_in_another_folder(
    config: Config, plain: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    relative: dict[str, Any] = {
        name: Path(os.path.relpath(getattr(config, name))) for name in ("model", "output")
    }
    relative["data"] = (Source(Path(os.path.relpath(config.data[0].path))),)
    Trainer(config.model_copy(update=relative)).train(Stopper(after=3))
    monkeypatch.chdir(plain)
    Trainer.resume(tmp_path / "out").train()
    same(config.output, plain)


def test_going_back_to_an_earlier_checkpoint_gives_the_later_ones_up(
    config: Config, plain: Path, tmp_path: Path
) -> None:
    Trainer(config.model_copy(update={"keep_checkpoints": 4})).train()
    assert steps_of(config) == ["step-2", "step-4", "step-6", "step-8"]
    early = checkpoints_folder(config.output) / "step-2"
    with pytest.raises(CheckpointError, match="result of 9 steps"):
        Trainer.resume(early).train()
    other = Trainer.resume(early, {"output": tmp_path / "other", "checkpoint_every": 5})
    other.train()
    same(tmp_path / "other", plain)
    assert names(checkpoints_folder(tmp_path / "other")) == ["step-5"]
    os.rename(config.output, tmp_path / "old")
    Trainer.resume(early, {"checkpoint_every": 3, "keep_checkpoints": 2}).train(Stopper(after=3))
    assert steps_of(config) == ["step-3", "step-4"]


def test_a_failed_run_names_the_checkpoint_to_go_on_from(
    config: Config, plain: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise TaskError("a task failed")

    with pytest.raises(TaskError):
        Trainer(config).train(Stopper(after=5, do=fail))
    assert "checkpoints/step-4; `slideformer resume" in caplog.text
    assert not config.output.exists()
    assert steps_of(config) == ["step-2", "step-4"]
    Trainer.resume(config.output).train()
    same(config.output, plain)


@pytest.mark.parametrize("how", ["removed", "altered"])
def test_a_model_folder_that_goes_during_training_is_not_missed(
    model: Path, data: Path, plain: Path, tmp_path: Path, how: str
) -> None:
    copy = tmp_path / "model"
    shutil.copytree(model, copy)
    config = run_config(copy, data, tmp_path / "out")

    def spoil() -> None:
        for path in copy.iterdir():
            path.unlink() if how == "removed" else path.write_bytes(b"{}")

    Trainer(config).train(Stopper(after=3, do=spoil))
    same(config.output, plain)
    exported = find_checkpoint(config.output).export(tmp_path / "exported")
    for path in exported.glob("*.json"):
        assert path.read_bytes() == (plain / path.name).read_bytes(), path


def test_an_nvme_disk_that_fails_costs_the_steps_since_the_last_checkpoint(
    config: Config,
    plain: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    disks = [tmp_path_factory.mktemp("disk") for _ in range(2)]
    original, write = engine_module.plan_for, os.pwritev
    broken = False

    def planned(*args: Any) -> MemoryPlan:
        plan = draft(original(*args))
        return replace(plan, nvme_moments=9, nvme_lo=9, nvme_hi=9, offloaded=9, nvme_boundaries=9)

    def fail(*args: Any) -> int:
        if broken:
            raise OSError(errno.EIO, "Input/output error")
        return write(*args)

    def break_down() -> None:
        nonlocal broken
        broken = True

    monkeypatch.setattr(engine_module, "plan_for", planned)
    monkeypatch.setattr(nvme.os, "pwritev", fail)
    with pytest.raises(StoreError, match=rf"{disks[0]}.*extent .*resume from the last checkpoint"):
        Trainer(config.model_copy(update={"nvme": (disks[0],)})).train(Stopper(5, do=break_down))
    assert "slideformer resume" in caplog.text
    assert not config.output.exists()
    broken = False
    Trainer.resume(config.output, {"nvme": [disks[1]]}).train()
    same(config.output, plain)
    assert [names(disk) for disk in disks] == [[], []]


def test_a_disk_that_is_full_for_a_while_does_not_end_the_run(
    config: Config, plain: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write = os.pwrite

    def full(descriptor: int, part: bytes, offset: int) -> int:
        if "step-4" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(28, "No space left on device")
        return write(descriptor, part, offset)

    monkeypatch.setattr(os, "pwrite", full)
    Trainer(config.model_copy(update={"keep_checkpoints": 9})).train()
    assert steps_of(config) == ["step-2", "step-6", "step-8"]
    assert "no checkpoint of step 4: no room" in caplog.text
    same(config.output, plain)


def test_what_came_to_lie_in_a_resumed_runs_output_is_left_alone(
    config: Config, plain: Path
) -> None:
    Trainer(config).train(Stopper(after=3))
    aside.discard(config.output)

    def take() -> None:
        config.output.mkdir()
        (config.output / "notes.txt").write_text("mine")

    result = Trainer.resume(config.output).train(Stopper(6, take))
    assert names(config.output) == ["notes.txt"]
    same(result.output, plain)


def test_a_run_of_which_nothing_is_left_keeps_its_trace(config: Config) -> None:
    config = config.model_copy(update={"steps": 8})
    Trainer(config).train()
    before = {path.name: path.read_bytes() for path in config.output.iterdir()}
    assert Trainer.resume(config.output).train().steps == 8
    assert {path.name: path.read_bytes() for path in config.output.iterdir()} == before
    aside.discard(config.output)
    Trainer.resume(config.output).train()  # as if killed before it was saved
    assert set(before) - set(names(config.output)) == {PLAN_FILE, GRAPH_FILE, TRACE_FILE}
    for name in names(config.output):
        assert (config.output / name).read_bytes() == before[name], name


def test_what_the_user_put_into_the_output_is_there_after_a_resumed_run(
    config: Config, plain: Path
) -> None:
    Trainer(config).train(Stopper(after=3))
    others = {"notes.txt": "mine", "pages/report.html": "<html>"}
    (config.output / "pages").mkdir()
    for name, text in others.items():
        (config.output / name).write_text(text)
    (config.output / "link").symlink_to("gone")
    result = Trainer.resume(config.output).train()
    assert result.output == config.output
    for name, text in others.items():
        assert (config.output / name).read_text() == text
        (config.output / name).unlink()
    assert (config.output / "link").readlink() == Path("gone")
    (config.output / "link").unlink()
    (config.output / "pages").rmdir()
    same(config.output, plain)
    assert names(config.output.parent) == ["out", "out-checkpoints"]


def test_an_output_with_what_cannot_be_taken_over_is_left_alone(
    config: Config, plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Trainer(config).train(Stopper(after=3))
    (config.output / "notes.txt").write_text("mine")

    def refuse(source: str, target: str) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted", source)

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(shutil, "copy2", refuse)
    result = Trainer.resume(config.output).train()
    assert (config.output / "notes.txt").read_text() == "mine"
    assert result.output == config.output.with_name("out-1")
    same(result.output, plain)


# -- what is refused -----------------------------------------------------------------------------


def test_another_run_into_the_same_place_is_refused(config: Config) -> None:
    Trainer(config.model_copy(update={"steps": 4})).train(Stopper(after=2))
    aside.discard(config.output)
    with pytest.raises(
        CheckpointError, match=r"earlier run, the last of step \d: .* resume .*out`"
    ):
        Trainer(config).train()


def test_a_second_run_into_the_same_place_at_once_is_refused(
    config: Config, plain: Path, tmp_path: Path
) -> None:
    config = config.model_copy(update={"output": tmp_path / "new" / "folder" / "out"})

    def try_again() -> None:
        found = find_checkpoint(config.output)
        for again in (Trainer(config), Trainer(config, checkpoint=found)):
            with pytest.raises(CheckpointError) as raised:
                again.train()
            assert str(raised.value) == (
                f"another run, process {os.getpid()}, is saving to {config.output}: wait for its "
                "end, or give another output"
            )

    Trainer(config).train(Stopper(after=5, do=try_again))
    same(config.output, plain)
    assert names(config.output.parent) == ["out", "out-checkpoints"]


def test_the_lock_of_a_killed_run_is_free(config: Config, tmp_path: Path, processes: Any) -> None:
    lock = tmp_path / ".out.lock"
    endless = processes(config.model_copy(update={"steps": 10**6}))
    while endless.is_alive() and not checkpoints_folder(config.output).exists():
        time.sleep(0.01)
    with pytest.raises(CheckpointError, match=f"another run, process {endless.pid}, is saving to"):
        Trainer(config).train()
    endless.kill()
    endless.join()
    assert lock.exists()
    aside.discard(checkpoints_folder(config.output))
    Trainer(config).train()
    assert names(tmp_path) == ["out", "out-checkpoints"]


def test_a_run_that_is_refused_leaves_no_folder(config: Config, tmp_path: Path) -> None:
    deep = {"output": tmp_path / "a" / "b" / "out", "model": tmp_path / "none"}
    with pytest.raises(CheckpointError):
        Trainer(config.model_copy(update=deep)).train()
    assert names(tmp_path) == []


def test_what_cannot_be_resumed_is_refused(config: Config, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no checkpoint to resume from"):
        Trainer.resume(config.output)
    Trainer(config).train(Stopper(after=2))
    with pytest.raises(ConfigError, match="lr cannot be changed when a run is resumed"):
        Trainer.resume(config.output, {"lr": 1e-4})
    with pytest.raises(ConfigError, match="learning rates are not those"):
        Trainer.resume(config.output, schedule=lambda _: 1e-3).train()
    other = tmp_path / "other.txt"
    other.write_text("Another text, of another length.")
    with pytest.raises(DataError, match="the saved run had"):
        Trainer.resume(config.output, {"data": other}).train()
    deeper = write_checkpoint(tmp_path / "deeper", num_hidden_layers=4)
    with pytest.raises(CheckpointError, match=r"manifest\.json: .* of another model: its layers"):
        Trainer.resume(config.output, {"model": deeper}).train()
    with pytest.raises(BudgetError, match="A resumed run keeps its batch") as raised:
        Trainer.resume(config.output, {"cpu_memory": "1MiB", "window": 3}).train()
    named = re.findall(r"--([a-z-]+)", str(raised.value))
    assert {name.replace("-", "_") for name in named} == {"cpu_memory", "window", "nvme"}
    (config.output / CONFIG_FILE).write_text("data: x\nmodel: y\noutput: z\n")
    with pytest.raises(CheckpointError, match="not empty and not of this run"):
        Trainer.resume(config.output).train()
    last = find_checkpoint(config.output).folder
    os.truncate(last / "units/L00", 10)
    with pytest.raises(CheckpointError, match="units/L00 is cut short"):
        Trainer.resume(config.output)


def test_no_room_for_a_checkpoint_is_refused_first(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = namedtuple("usage", "total used free")
    state = 12 * Engine(config).spec.param_count
    monkeypatch.setattr(Engine, "__init__", lambda *_, **__: pytest.fail("it was planned"))
    for there, every, message in (
        (
            aside._HEADROOM,
            None,
            f"no room for output {config.output}: it needs .* 64.0 MiB to spare",
        ),
        (aside._HEADROOM + 2 * state, 2, "no room for checkpoints and output"),
    ):
        monkeypatch.setattr("shutil.disk_usage", lambda _, there=there: free(1 << 60, 0, there))
        with pytest.raises(CheckpointError, match=message):
            Trainer(config.model_copy(update={"checkpoint_every": every})).train()


def test_what_was_trained_is_saved_on_the_last_free_bytes(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = namedtuple("usage", "total used free")

    def fill() -> None:
        monkeypatch.setattr("shutil.disk_usage", lambda _: free(1 << 60, 0, 1 << 20))

    Trainer(config.model_copy(update={"checkpoint_every": None})).train(Stopper(3, fill))
    assert json.loads((config.output / METRICS_FILE).read_text().splitlines()[-1])["step"] == STEPS


def test_a_run_on_another_device_says_that_bits_will_differ(
    config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Trainer(config).train(Stopper(after=3))
    assert "last bits" not in caplog.text
    numerics = {**find_checkpoint(config.output).info.numerics, "device": "an abacus"}
    monkeypatch.setattr(Engine, "numerics", numerics)
    Trainer.resume(config.output).train()
    assert "is an abacus now: the result will differ in the last bits" in caplog.text


# -- kill -9 -------------------------------------------------------------------------------------


def child(config: Config) -> None:
    """Begin the run, or go on with it."""
    try:
        trainer = Trainer.resume(config.output)
    except CheckpointError:
        trainer = Trainer(config)
    with suppress(CheckpointError):  # killed when all was done
        trainer.train()


@pytest.fixture
def processes() -> Iterator[Any]:
    """A server whose processes have loaded everything; each `start` is one of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["slideformer.trainer", __name__])
    started: list[ForkServerProcess] = []

    def start(config: Config) -> ForkServerProcess:
        started.append(context.Process(target=child, args=(config,)))
        started[-1].start()
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.join()


def check_left(config: Config) -> int:
    """After a kill: every checkpoint is whole; returns the last one's step."""
    folder = checkpoints_folder(config.output)
    found = [Checkpoint(path) for path in folder.glob("step-*")]
    for checkpoint in found:
        for name in checkpoint._reader.files:
            checkpoint._reader.content(name)
    return max((checkpoint.info.step for checkpoint in found), default=0)


def test_the_lock_of_a_run_that_was_killed_when_all_was_saved_goes(
    config: Config, tmp_path: Path
) -> None:
    Trainer(config).train()
    (tmp_path / ".out.lock").write_text("12345")
    with pytest.raises(CheckpointError, match="out"):
        Trainer(config).train()
    assert names(tmp_path) == ["out", "out-checkpoints"]
    (tmp_path / ".out.lock").write_text("12345")
    with pytest.raises(CheckpointError, match="out"):
        Trainer.resume(config.output).train()
    assert names(tmp_path) == ["out", "out-checkpoints"]


def test_kills_at_any_instant_lose_no_more_than_the_steps_since_the_last_checkpoint(
    model: Path, data: Path, plain: Path, tmp_path: Path, processes: Any
) -> None:
    draw = random.Random(KILLS)
    config = run_config(model, data, tmp_path / "0" / "out")
    whole = processes(config)
    started = time.perf_counter()
    whole.join()
    duration = time.perf_counter() - started
    kills, run, reached = 0, 0, 0
    while True:
        process = processes(config)
        process.join(draw.uniform(0, 1.1) * duration if kills < KILLS else None)
        if process.is_alive():
            process.kill()
            process.join()
            kills += 1
            step = check_left(config)
            assert step >= reached, "what was reached is not lost"
            reached = step
            continue
        assert process.exitcode == 0
        same(config.output, plain)
        assert names(config.output.parent) == ["out", "out-checkpoints"]
        assert steps_of(config) == ["step-6", "step-8"]
        if kills == KILLS:
            break
        run, reached = run + 1, 0
        config = run_config(model, data, tmp_path / str(run) / "out")
