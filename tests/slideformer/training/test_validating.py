"""Validation while a run trains: its figures, the best checkpoint, and when a run stops early."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from slideformer.config import Config, load_config
from slideformer.engine import Engine
from slideformer.graph.errors import ConfigError
from slideformer.models.data.dataset import TokenDataset
from slideformer.models.tokenizers import load_tokenizer
from slideformer.trainer import Trainer
from slideformer.training.checkpoints import checkpoints_folder, find_checkpoint
from slideformer.training.reports import METRICS_FILE, RunStart, StepMetrics
from slideformer.training.validating import Validation
from tests.support.checkpoints import SEQ_LEN, write_checkpoint, write_lines, write_text

TEXT = "Pack my box with five dozen jugs."
DOCUMENTS = [{"text": TEXT[:length]} for length in (30, 9, 20, 5, 14)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture
def config(model: Path, tmp_path: Path) -> Config:
    """Seven steps, evaluated on five documents after every second one."""
    return run_config(
        model=model,
        data=write_text(tmp_path / "text.txt"),
        validation=write_lines(tmp_path / "held.jsonl", *DOCUMENTS),
        output=tmp_path / "out",
    )


def run_config(**settings: Any) -> Config:
    fields = {"batch_size": 2, "seq_len": SEQ_LEN, "lr": 1e-3, "device": "cpu", "threads": 1}
    return load_config(None, {**fields, "steps": 7, "evaluate_every": 2, **settings})


def changed(config: Config, **settings: Any) -> Config:
    return Config(**{**config.model_dump(), **settings})


def metrics(config: Config) -> list[dict[str, Any]]:
    lines = (config.output / METRICS_FILE).read_text().splitlines()
    return [{**json.loads(line), "seconds": 0} for line in lines]


def losses(config: Config) -> dict[int, float]:
    return {m["step"]: m["validation_loss"] for m in metrics(config) if "validation_loss" in m}


class Fixed:
    """Gives evaluations these losses in turn, the last one again and again."""

    def __init__(self, *values: float) -> None:
        self._values = list(values)

    def __call__(self, *_: Any) -> float:
        return self._values.pop(0) if len(self._values) > 1 else self._values[0]


@pytest.mark.parametrize(("packing", "accumulate"), [(False, 1), (True, 2)])
def test_the_figures_are_those_of_the_weights_after_the_step(
    config: Config, packing: bool, accumulate: int
) -> None:
    config = changed(config, checkpoint_every=2, keep_checkpoints=9, packing=packing)
    config = changed(config, compute="fp32", accumulate=accumulate)
    Trainer(config).train()
    found = losses(config)
    assert list(found) == [2, 4, 6, 7]
    tokenizer = load_tokenizer(config.model)
    for step in (2, 6):
        output = config.output.parent / f"exported-{step}"
        find_checkpoint(checkpoints_folder(config.output) / f"step-{step}").export(output)
        model = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
        total, tokens = 0.0, 0
        dataset = TokenDataset.from_sources(config.validation, tokenizer, SEQ_LEN)
        for part in dataset.parts:
            for row in range(len(part)):
                ids = torch.from_numpy(part.read(torch.tensor([row]).numpy())[0]).long()[None]
                with torch.inference_mode():
                    total += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
                tokens += ids.shape[1] - 1
        assert found[step] == pytest.approx(total / tokens, rel=1e-5)
    for line in metrics(config):
        if "validation_loss" in line:
            assert line["validation_perplexity"] == math.exp(line["validation_loss"])


def test_evaluations_change_no_weight_and_no_other_figure(config: Config) -> None:
    Trainer(config).train()
    plain = changed(config, output=config.output.with_name("plain"), evaluate_every=None)
    Trainer(plain).train()
    assert list(losses(plain)) == [7], "without evaluate_every once, after the last step"
    assert losses(plain)[7] == losses(config)[7]
    for path in plain.output.glob("*.safetensors"):
        assert path.read_bytes() == (config.output / path.name).read_bytes()
    names = ("validation_loss", "validation_perplexity")
    ours, theirs = (
        [{k: v for k, v in line.items() if k not in names} for line in metrics(each)]
        for each in (config, plain)
    )
    assert ours == theirs


def test_a_split_is_validated_with(config: Config) -> None:
    config = changed(config, validation=(), validation_split=0.2)
    Trainer(config).train()
    assert list(losses(config)) == [2, 4, 6, 7]


def test_the_best_checkpoint_is_kept_and_linked(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Validation, "_loss_of", Fixed(3.0, 2.0, 2.5))
    config = changed(config, checkpoint_every=3, keep_checkpoints=1)
    result = Trainer(config).train()
    folder = checkpoints_folder(config.output)
    assert result.best == 4
    assert sorted(path.name for path in folder.iterdir()) == ["best", "step-4", "step-6"]
    assert (folder / "best").resolve() == folder / "step-4"
    assert find_checkpoint(folder / "best").info.step == 4


def test_a_run_stops_when_its_patience_is_exhausted_and_stays_so(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Validation, "_loss_of", Fixed(3.0, 2.0, 2.5))
    config = changed(config, steps=20, patience=2, checkpoint_every=8)
    result = Trainer(config).train()
    assert (result.steps, result.best, result.exhausted) == (8, 4, True)
    assert len(metrics(config)) == 8
    assert find_checkpoint(checkpoints_folder(config.output) / "best").info.step == 4
    again = Trainer.resume(config.output).train()
    assert (again.steps, again.exhausted) == (8, True)
    assert len(metrics(config)) == 8


class Stopper:
    """A progress that asks the run to stop after some step."""

    def __init__(self, after: int) -> None:
        self._after = after

    def start(self, run: RunStart) -> None:
        pass

    def step(self, metrics: StepMetrics) -> None:
        if metrics.step == self._after:
            signal.raise_signal(signal.SIGINT)

    def finish(self) -> None:
        pass


@pytest.mark.parametrize("after", [1, 3, 4])
def test_a_resumed_run_evaluates_as_one_without_interruption(
    config: Config, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    plain = changed(config, output=config.output.with_name("plain"))
    Trainer(plain).train()
    assert Trainer(config).train(Stopper(after)).interrupted
    Trainer.resume(config.output).train()
    assert metrics(config) == metrics(plain)


def test_an_evaluation_that_ctrl_c_ends_is_done_when_the_run_is_resumed(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = changed(config, output=config.output.with_name("plain"))
    Trainer(plain).train()
    evaluate = Engine.evaluate

    def interrupted(self: Engine, batch: Any) -> Any:
        if self.steps == 4:
            signal.raise_signal(signal.SIGINT)
        return evaluate(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "evaluate", interrupted)
        assert Trainer(config).train().interrupted
    assert list(losses(config)) == [2]
    Trainer.resume(config.output).train()
    assert metrics(config) == metrics(plain)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"validation": ()}, "evaluate_every is 2, but there is nothing to evaluate"),
        ({"evaluate_every": None, "patience": 3}, "patience is 3, but evaluate_every is not set"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    config: Config, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        changed(config, **settings)
