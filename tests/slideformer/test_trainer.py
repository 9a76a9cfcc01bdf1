"""Training from a config: what is saved, what is refused, and how a run ends early."""

from __future__ import annotations

import io
import json
import re
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from slideformer import engine as engine_module
from slideformer import run_memory
from slideformer.config import Config, load_config
from slideformer.engine import Engine
from slideformer.graph.errors import (
    BudgetError,
    CheckpointError,
    ConfigError,
    DataError,
    SlideFormerError,
)
from slideformer.kernels.adamw_library import kernel_build
from slideformer.models.data.batches import BatchStream
from slideformer.models.data.dataset import TokenDataset
from slideformer.models.tokenizers import load_tokenizer
from slideformer.tools.progress import ConsoleProgress
from slideformer.trainer import Trainer
from slideformer.training import loop
from slideformer.training.reports import (
    CONFIG_FILE,
    METRICS_FILE,
    NUMERICS_FILE,
    RunStart,
    StepMetrics,
)
from tests.support.checkpoints import SEQ_LEN, write_checkpoint, write_lines, write_text
from tests.support.spoiling import spoil


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture
def config(model: Path, tmp_path: Path) -> Config:
    """A run of four steps of two rows."""
    data = write_text(tmp_path / "text.txt")
    return run_config(model=model, data=data, output=tmp_path / "out", steps=4)


def run_config(**settings: Any) -> Config:
    small = {"batch_size": 2, "seq_len": SEQ_LEN, "lr": 1e-3, "device": "cpu"}
    return load_config(None, {**small, **settings})


def changed(config: Config, **settings: Any) -> Config:
    return Config(**{**config.model_dump(), **settings})


class Recorder:
    """A progress that remembers, and does something after one of the steps."""

    def __init__(self, after: int = 0, do: Any = None) -> None:
        self.run: RunStart | None = None
        self.steps: list[StepMetrics] = []
        self.finished = 0
        self._after, self._do = after, do

    def start(self, run: RunStart) -> None:
        self.run = run

    def step(self, metrics: StepMetrics) -> None:
        self.steps.append(metrics)
        if metrics.step == self._after:
            self._do()

    def finish(self) -> None:
        self.finished += 1


def read_metrics(output: Path) -> list[StepMetrics]:
    lines = (output / METRICS_FILE).read_text().splitlines()
    return [StepMetrics(**json.loads(line)) for line in lines]


def interrupt(times: int = 1) -> None:
    for _ in range(times):
        signal.raise_signal(signal.SIGINT)


# -- what a run leaves ---------------------------------------------------------------------------


def test_a_run_saves_a_checkpoint_that_transformers_opens(config: Config) -> None:
    config = changed(config, steps=30, lr=3e-3)
    progress = Recorder()
    result = Trainer(config).train(progress)

    model, loading = AutoModelForCausalLM.from_pretrained(config.output, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    before = AutoModelForCausalLM.from_pretrained(config.model)
    for (name, tuned), start in zip(model.named_parameters(), before.parameters(), strict=True):
        assert not torch.equal(tuned, start), name
    text = "The quick brown fox jumps over the lazy dog."
    ids = AutoTokenizer.from_pretrained(config.output)(text, return_tensors="pt").input_ids
    with torch.inference_mode():
        assert model(ids, labels=ids).loss < before(ids, labels=ids).loss - 1

    assert load_config(config.output / CONFIG_FILE, {}) == config
    assert (result.steps, result.output, result.interrupted) == (30, config.output, False)
    assert progress.finished
    assert progress.run is not None
    assert (progress.run.config, progress.run.steps) == (config, 30)
    assert progress.steps == read_metrics(config.output)
    assert result.loss == progress.steps[-1].loss < progress.steps[0].loss - 1


def test_the_steps_are_those_of_an_engine_fed_by_hand(config: Config) -> None:
    Trainer(config).train()
    dataset = TokenDataset.from_sources(config.data, load_tokenizer(config.model), SEQ_LEN)
    stream = BatchStream(dataset, config.batch_size, config.seed)
    with Engine(config) as engine:
        handles = [engine.step(next(stream)) for _ in range(4)]
        found = [(h.number, h.loss(), h.gradient_norm(), h.real_tokens) for h in handles]
    metrics = read_metrics(config.output)
    assert [(m.step, m.loss, m.gradient_norm, m.tokens) for m in metrics] == found
    assert all(m.lr == config.lr and m.seconds > 0 for m in metrics)


def test_what_decides_the_rounding_is_saved(config: Config) -> None:
    config = changed(config, micro_batch=1, compute="fp32")
    progress = Recorder()
    Trainer(config).train(progress)
    numerics = json.loads((config.output / NUMERICS_FILE).read_text())
    assert progress.run is not None
    plan = progress.run.plan
    capability = torch.backends.cpu.get_cpu_capability()
    assert numerics == {
        "compute": "fp32",
        "micro_rows": 1,
        "vocab_chunks": plan.vocab_chunks,
        "head_tile": plan.head_tile,
        "mlp_tile": plan.mlp_tile,
        "kept": plan.kept,
        "spilled": plan.spilled,
        "attention": "sdpa",
        "kernels": kernel_build(),
        "device": f"CPU with {capability}, {torch.get_num_threads()} operator threads",
        "torch": torch.__version__,
    }
    with Engine(config) as engine:
        assert engine.numerics == numerics
    with Engine(changed(config, micro_batch=2)) as engine:
        assert engine.numerics != numerics


def test_speed_counts_real_tokens_and_leaves_the_first_step_out(config: Config) -> None:
    data = write_lines(
        config.data[0].path.with_suffix(".jsonl"), *[{"text": "A" * n} for n in (5, 9, 7)]
    )
    config = changed(config, data=data, batch_size=1, steps=None)
    result = Trainer(config).train()
    metrics = read_metrics(config.output)
    assert sorted(m.tokens for m in metrics) == [6, 8, 10]  # an end of sequence each
    tokens = sum(m.tokens for m in metrics[1:])
    assert result.tokens_per_second == tokens / sum(m.seconds for m in metrics[1:])


def test_a_result_is_read_when_the_next_step_is_submitted(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    step = Engine.step

    def recorded(self: Engine, batch: Any, **options: Any) -> Any:
        handle = step(self, batch, **options)
        order.append(f"submit {handle.number}")
        return handle

    monkeypatch.setattr(Engine, "step", recorded)

    class Noting(Recorder):
        def step(self, metrics: StepMetrics) -> None:
            order.append(f"read {metrics.step}")

    Trainer(changed(config, steps=3)).train(Noting())
    assert order == ["submit 1", "submit 2", "read 1", "submit 3", "read 2", "read 3"]


@pytest.mark.parametrize(("epochs", "steps"), [(None, 2), (2, 4)])
def test_without_steps_epochs_count(config: Config, epochs: int | None, steps: int) -> None:
    data = write_lines(config.data[0].path.with_suffix(".jsonl"), *[{"text": "text"}] * 3)
    progress = Recorder()
    config = changed(config, data=data, steps=None, epochs=epochs)
    assert Trainer(config).train(progress).steps == steps
    assert progress.run is not None
    assert progress.run.steps == steps


def test_a_step_without_targets_is_skipped_with_a_warning(
    config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    records = [{"prompt": "x" * n, "completion": "y"} for n in (5, 2 * SEQ_LEN, 6, 3 * SEQ_LEN)]
    data = write_lines(config.data[0].path.with_suffix(".jsonl"), *records)
    config = changed(config, data=data, batch_size=1, steps=None)
    assert Trainer(config).train().steps == 2
    assert caplog.text.count("skipped a batch of 1 rows without a target token") == 2


def test_it_runs_outside_the_main_thread(config: Config) -> None:
    results: list[int] = []
    thread = threading.Thread(target=lambda: results.append(Trainer(config).train().steps))
    thread.start()
    thread.join()
    assert results == [4]


# -- what is refused, before memory is allocated ---------------------------------------------------


def refuse(config: Config, kind: type[SlideFormerError], words: str) -> None:
    with pytest.raises(kind, match=words):
        Trainer(config).train()


@pytest.fixture
def no_arenas(monkeypatch: pytest.MonkeyPatch) -> None:
    def arenas(*_: Any) -> None:
        raise AssertionError("memory was allocated")

    monkeypatch.setattr(run_memory, "Arenas", arenas)


@pytest.mark.usefixtures("no_arenas")
class TestRefusedFirst:
    def test_output(self, config: Config) -> None:
        config.output.mkdir()
        (config.output / "notes").touch()
        refuse(config, CheckpointError, "is not empty")

    def test_model(self, config: Config) -> None:
        refuse(changed(config, model=config.model / "no"), CheckpointError, "does not exist")

    def test_data(self, config: Config) -> None:
        refuse(changed(config, data=Path("no.txt")), DataError, "no.txt: there is no such file")
        refuse(changed(config, data=config.model), DataError, "is a directory")

    def test_a_line_of_the_data(self, config: Config) -> None:
        data = write_lines(config.data[0].path.with_suffix(".jsonl"), {"text": "a"}, {"txt": "b"})
        refuse(changed(config, data=data), DataError, "jsonl, line 2: the keys")

    def test_sequence_length(self, config: Config) -> None:
        refuse(changed(config, seq_len=65), ConfigError, "positions for 64; use --seq-len 64")

    def test_budget(self, config: Config) -> None:
        refuse(changed(config, gpu_memory="1MiB"), BudgetError, "least that works is --gpu-memory")

    def test_vocabulary(self, config: Config, tmp_path: Path) -> None:
        model = write_checkpoint(tmp_path / "small")
        path = model / "config.json"
        settings = {**json.loads(path.read_text()), "vocab_size": 100, "pad_token_id": None}
        path.write_text(json.dumps(settings))
        tensors = load_file(model / "model.safetensors")
        for key in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[key] = tensors[key][:100].clone()
        save_file(tensors, model / "model.safetensors", {"format": "pt"})
        refuse(changed(config, model=model), DataError, "vocabulary has 100 entries")

    def test_weights_of_another_shape(
        self, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def plan_for(*_: Any) -> None:
            raise AssertionError("it was planned")

        monkeypatch.setattr(engine_module, "plan_for", plan_for)
        model = write_checkpoint(tmp_path / "wrong")
        tensors = load_file(model / "model.safetensors")
        tensors["model.norm.weight"] = tensors["model.norm.weight"][1:].clone()
        save_file(tensors, model / "model.safetensors", {"format": "pt"})
        config = changed(config, model=model)
        words = r"has shape \[63\], config.json asks for \[64\]"
        with pytest.raises(CheckpointError, match=words):
            Engine(config)
        refuse(config, CheckpointError, words)
        with pytest.raises(AssertionError, match="it was planned"):  # random weights need no files
            Engine(config, initial=AutoConfig.from_pretrained(model))

    def test_arenas_would_be_noticed(self, config: Config) -> None:
        with pytest.raises(AssertionError, match="memory was allocated"):
            Trainer(config).train()


def test_a_model_folder_without_a_tokenizer_is_refused(config: Config, tmp_path: Path) -> None:
    # For this family transformers would make up an empty tokenizer.
    model = write_checkpoint(tmp_path / "qwen", variant="qwen2")
    for path in model.glob("tokenizer*"):
        path.unlink()
    refuse(changed(config, model=model), CheckpointError, "has no tokenizer")


def test_a_damaged_tokenizer_is_refused(config: Config, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "damaged")
    text = (model / "tokenizer.json").read_text()
    (model / "tokenizer.json").write_text(text[: len(text) // 2])
    refuse(changed(config, model=model), CheckpointError, "the tokenizer in .* cannot be read")


# -- how a run ends early ------------------------------------------------------------------------


def leftovers(config: Config) -> list[str]:
    return sorted(
        path.name for path in config.output.parent.iterdir() if path != config.data[0].path
    )


def test_a_step_that_is_not_finite_ends_the_run_and_saves_nothing(
    config: Config, tmp_path: Path
) -> None:
    model = write_checkpoint(tmp_path / "broken")
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][0] = np.inf
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    progress = Recorder()
    threads = threading.active_count()
    with pytest.raises(SlideFormerError, match="finite"):
        Trainer(changed(config, model=model)).train(progress)
    assert leftovers(config) == ["broken"]
    assert progress.finished
    assert threading.active_count() == threads


def test_progress_ends_when_the_weights_cannot_be_read(config: Config, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "cut")
    data = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(data[: len(data) // 2])
    progress = Recorder()
    with pytest.raises(CheckpointError):
        Trainer(changed(config, model=model)).train(progress)
    assert progress.finished
    assert leftovers(config) == ["cut"]


def test_ctrl_c_finishes_the_steps_in_flight_and_saves(
    config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    config = changed(config, steps=1000)
    handler = signal.getsignal(signal.SIGINT)
    progress = Recorder(after=2, do=interrupt)
    result = Trainer(config).train(progress)
    assert result.interrupted
    assert result.steps == 3  # the third was in flight when the second was read
    assert len(read_metrics(config.output)) == 3
    AutoModelForCausalLM.from_pretrained(config.output)
    assert "Ctrl-C: finishing the steps in flight" in caplog.text
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_second_ctrl_c_leaves_at_once_and_saves_nothing(config: Config) -> None:
    handler = signal.getsignal(signal.SIGINT)
    progress = Recorder(after=2, do=lambda: interrupt(2))
    with pytest.raises(KeyboardInterrupt):
        Trainer(changed(config, steps=1000)).train(progress)
    assert leftovers(config) == []
    assert progress.finished
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_second_ctrl_c_while_saving_leaves_nothing_half_written(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait = Engine.synchronize

    def interrupted(self: Engine) -> None:
        interrupt(2)
        wait(self)

    monkeypatch.setattr(Engine, "synchronize", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Trainer(config).train()
    assert leftovers(config) == []


def test_ctrl_c_before_the_first_step_saves_nothing(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn_ahead = loop._drawn_ahead

    def interrupted(stream: BatchStream) -> Any:
        interrupt()
        return drawn_ahead(stream)

    monkeypatch.setattr(loop, "_drawn_ahead", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Trainer(config).train()
    assert leftovers(config) == []


def test_a_disk_that_fills_behind_the_weights_leaves_nothing(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    refuse(config, CheckpointError, "no room for checkpoint")
    assert leftovers(config) == []


def test_a_trace_that_cannot_be_written_does_not_hide_where_the_model_is(
    config: Config, tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    taken = Recorder(1, lambda: (trace / "step.json").mkdir())
    with pytest.raises(ConfigError, match=f"trace .* cannot be written.* saved as {config.output}"):
        Trainer(changed(config, trace=trace)).train(taken)
    assert (config.output / "config.json").exists()


def test_an_output_that_is_taken_meanwhile_is_left_alone(
    config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    def take() -> None:
        config.output.mkdir()
        (config.output / "notes.txt").write_text("mine")

    result = Trainer(config).train(Recorder(1, take))
    beside = config.output.with_name(f"{config.output.name}-1")
    assert result.output == beside
    assert (
        "is not empty: give another one, or empty it first; meanwhile the model is" in caplog.text
    )
    assert (beside / "model.safetensors.index.json").exists()
    assert [path.name for path in config.output.iterdir()] == ["notes.txt"]


# -- the learning rate ---------------------------------------------------------------------------


def test_every_step_has_the_learning_rate_of_the_schedule(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[float | None] = []
    step = Engine.step

    def spy(self: Engine, batch: Any, *, lr: float | None = None) -> Any:
        used.append(lr)
        return step(self, batch, lr=lr)

    monkeypatch.setattr(Engine, "step", spy)
    config = changed(config, schedule="linear", warmup_steps=2)
    Trainer(config).train()
    expected = [0.0, 5e-4, 1e-3, 5e-4]
    assert used == pytest.approx(expected)
    assert [m.lr for m in read_metrics(config.output)] == pytest.approx(expected)


def test_a_callable_replaces_the_schedule(config: Config) -> None:
    Trainer(config, schedule=lambda step: 1e-4 * step).train()
    assert [m.lr for m in read_metrics(config.output)] == pytest.approx([1e-4, 2e-4, 3e-4, 4e-4])


def test_a_warm_up_longer_than_the_run_is_refused_before_memory_is_allocated(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_memory, "Arenas", lambda *_: pytest.fail("allocated"))
    with pytest.raises(ConfigError, match="warmup_steps is 9, but the run has 4 steps"):
        Trainer(changed(config, warmup_steps=9)).train()
    assert not config.output.exists()


def test_a_skipped_step_is_told(
    config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Metrics stay JSON, which has no NaN; the bar counts it, and the smoothed loss goes on."""
    spoil(monkeypatch, {1})
    config = changed(config, skip_nonfinite=True, micro_batch=2, compute="fp32")
    screen = io.StringIO()
    Trainer(config).train(ConsoleProgress(Console(file=screen, force_terminal=True, width=220)))
    lines = (config.output / METRICS_FILE).read_text().splitlines()
    metrics = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert [each["skipped"] for each in metrics] == [False, True, False, False]
    assert [each["gradient_norm"] is None for each in metrics] == [False, True, False, False]
    assert "step 2 is skipped: the gradient of L01.c0 is not finite" in caplog.text
    assert re.search(r"4/4.* loss \d\.\d+ \(\d\.\d+\) .*1 skipped", screen.getvalue())
