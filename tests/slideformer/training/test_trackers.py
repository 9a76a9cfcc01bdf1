"""TensorBoard and Weights & Biases get every step's figures; a missing package is said at once."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from slideformer.config import Config
from slideformer.graph.errors import ConfigError
from slideformer.graph.plan import Budgets
from slideformer.trainer import Trainer
from slideformer.training.reports import RunStart, StepMetrics
from slideformer.training.trackers import scalars, with_trackers
from tests.support.checkpoints import SEQ_LEN, write_checkpoint, write_text
from tests.support.specs import small_plan, small_spec


def metrics(step: int, loss: float = 2.0) -> StepMetrics:
    return StepMetrics(step, loss, 1.0, 1e-3, 100, 0.5, skipped=False)


def start(config: Config, done: int = 0) -> RunStart:
    return RunStart(config, small_spec(), small_plan(), Budgets(None, 1 << 30), 10, done)


def config_of(folder: Path, **settings: Any) -> Config:
    return Config(**{"model": folder / "m", "data": "d", "output": folder / "out", **settings})


def test_scalars_are_the_finite_figures() -> None:
    assert scalars(metrics(3, math.nan)) == {
        "gradient_norm": 1.0,
        "lr": 1e-3,
        "tokens": 100.0,
        "seconds": 0.5,
        "skipped": 0.0,
        "tokens_per_second": 200.0,
    }


def test_without_a_tracker_the_progress_alone_hears(tmp_path: Path) -> None:
    heard: list[Any] = []
    progress = SimpleNamespace(
        start=heard.append, step=heard.append, finish=lambda: heard.append("end")
    )
    config = config_of(tmp_path)
    told = with_trackers(config, progress)
    run, step = start(config), metrics(1)
    told.start(run)
    told.step(step)
    told.finish()
    assert heard == [run, step, "end"]
    with_trackers(config, None).finish()


@pytest.mark.parametrize(
    ("setting", "module", "words"),
    [
        (
            "tensorboard",
            "tensorboard",
            r"tensorboard is .*/x, but the package is not installed; .*",
        ),
        ("wandb", "wandb", r"wandb is '.*/x', but the package is not installed; install it"),
    ],
)
def test_a_missing_package_is_refused_before_anything_is_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str, module: str, words: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    config = config_of(tmp_path, **{setting: str(tmp_path / "x")})
    with pytest.raises(ConfigError, match=words):
        Trainer(config).train()
    assert list(tmp_path.iterdir()) == []


class FakeWandb:
    """Takes down what it is told."""

    def __init__(self) -> None:
        self.opened: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished = 0

    def init(self, **settings: Any) -> FakeWandb:
        if settings["project"] == "refused":
            raise RuntimeError("no account")
        self.opened.append(settings)
        return self

    def log(self, values: dict[str, float], *, step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_weights_and_biases(tmp_path: Path, wandb: FakeWandb) -> None:
    config = config_of(tmp_path, wandb="project")
    for done in (0, 3):
        told = with_trackers(config, None)
        told.start(start(config, done))
        told.step(metrics(done + 1))
        told.finish()
    assert wandb.logged == [(1, scalars(metrics(1))), (4, scalars(metrics(4)))]
    first, resumed = wandb.opened
    assert (first["project"], first["name"], first["resume"]) == ("project", "out", None)
    assert (resumed["id"], resumed["resume"]) == (first["id"], "allow")
    assert first["config"]["lr"] == config.lr
    assert wandb.finished == 2


def test_what_weights_and_biases_refuses_is_said(tmp_path: Path, wandb: FakeWandb) -> None:
    config = config_of(tmp_path, wandb="refused")
    told = with_trackers(config, None)
    with pytest.raises(ConfigError, match="'refused' cannot be opened: no account; check `wandb"):
        told.start(start(config))
    told.finish()
    assert wandb.finished == 0


class TestTensorBoard:
    """Event files, read back with the package itself."""

    @pytest.fixture(autouse=True)
    def _package(self) -> None:
        pytest.importorskip("tensorboard")

    def test_a_run_writes_its_curves(self, tmp_path: Path) -> None:
        config = config_of(
            tmp_path,
            model=write_checkpoint(tmp_path / "model"),
            data=write_text(tmp_path / "text.txt"),
            tensorboard=tmp_path / "events",
            batch_size=2,
            seq_len=SEQ_LEN,
            steps=3,
            device="cpu",
        )
        result = Trainer(config).train()
        losses = self._read(tmp_path / "events", "loss")
        assert [step for step, _ in losses] == [1, 2, 3]
        assert losses[-1][1] == pytest.approx(result.loss)

    def test_a_resumed_run_writes_over_what_came_after(self, tmp_path: Path) -> None:
        config = config_of(tmp_path, tensorboard=tmp_path / "events")
        for done, loss in ((0, 3.0), (2, 4.0)):
            told = with_trackers(config, None)
            told.start(start(config, done))
            for step in range(done + 1, done + 4):
                told.step(metrics(step, loss))
            told.finish()
        expected = [(1, 3.0), (2, 3.0), (3, 4.0), (4, 4.0), (5, 4.0)]
        assert self._read(tmp_path / "events", "loss") == expected

    def test_a_folder_that_cannot_be_made(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        config = config_of(tmp_path, tensorboard=tmp_path / "file" / "events")
        told = with_trackers(config, None)
        with pytest.raises(ConfigError, match=r"events cannot be written: .*; name another"):
            told.start(start(config))

    @staticmethod
    def _read(folder: Path, name: str) -> list[tuple[int, float]]:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(folder))
        events.Reload()
        return [(each.step, each.value) for each in events.Scalars(name)]
