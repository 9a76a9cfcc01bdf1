"""The command line: flags, the report, exit codes, and one clear message for every bad input."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from slideformer import this_machine
from slideformer.config import Config, load_config
from slideformer.graph.machines import load_machine
from slideformer.settings.problems import flag_name
from slideformer.tools.cli import app
from slideformer.tools.progress import ConsoleProgress
from slideformer.tools.setting_flags import FLAGS
from slideformer.trainer import Trainer
from slideformer.training.reports import CONFIG_FILE
from tests.support.checkpoints import SEQ_LEN, write_checkpoint, write_lines, write_text


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"))


class Run:
    """A run of ``slideformer train`` that would work, in a folder of its own."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.folder = folder
        self.flags: dict[str, str] = {
            "--model": str(model),
            "--data": str(write_text(folder / "text.txt")),
            "--output": str(folder / "out"),
            "--batch-size": "2",
            "--seq-len": str(SEQ_LEN),
            "--steps": "3",
            "--device": "cpu",
        }

    def arguments(self, **changes: str) -> list[str]:
        """The arguments, with flags changed: ``seq_len="64"``."""
        flags = {**self.flags, **{flag_name(name): value for name, value in changes.items()}}
        return ["train", *(part for flag in flags.items() for part in flag)]

    def refused(self, **changes: str) -> str:
        """The one message with which a run is refused; it leaves nothing behind."""
        before = sorted(self.folder.rglob("*"))
        code, _, err = call(*self.arguments(**changes))
        assert code == 1
        assert "Traceback" not in err
        assert sorted(self.folder.rglob("*")) == before
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        assert err.endswith(errors[0] + "\n")
        return errors[0]


@pytest.fixture
def run(model: Path, tmp_path: Path) -> Run:
    return Run(model, tmp_path)


def call(*arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command, run within this process."""
    result = CliRunner().invoke(app, arguments)
    return result.exit_code, result.stdout, result.stderr


# -- train ---------------------------------------------------------------------------------------


def test_train_prints_the_plan_and_progress_to_stderr_and_the_result_to_stdout(run: Run) -> None:
    code, out, err = call(*run.arguments(log_every="2"))
    assert code == 0, err
    output = run.folder / "out"
    assert re.fullmatch(
        rf"saved {re.escape(str(output))}: 3 steps, loss \d\.\d+, [\d,]+ tokens/s\n", out
    )
    assert err.index("Plan: llama") < err.index("step 2/3") < err.index("step 3/3")
    assert "step 1/3" not in err
    assert re.search(
        r"step 2/3  loss \d\.\d{3} \(\d\.\d{3}\)  norm \S+  lr \S+  [\d,]+ tokens/s  .*host \d", err
    )
    assert (output / "model.safetensors.index.json").is_file()


def test_flags_override_the_file_and_the_merged_config_is_saved(run: Run) -> None:
    path = run.folder / "run.yaml"
    path.write_text("lr: 1e-4\nsteps: 100\ngpu_memory: 24GiB\nweight_decay: 0.1\n")
    code, _, err = call(*run.arguments(weight_decay="0.2"), "--config", str(path))
    assert code == 0, err
    config = load_config(run.folder / "out" / CONFIG_FILE, {})
    assert (config.lr, config.steps, config.weight_decay) == (1e-4, 3, 0.2)
    assert config.gpu_memory == 24 * 2**30


def test_a_run_leaves_a_trace_that_stands_beside_the_prediction(run: Run) -> None:
    folder = run.folder / "trace"
    code, _, err = call(*run.arguments(trace=str(folder)))
    assert code == 0, err
    page = run.folder / "step.html"
    flags = ["--trace", str(folder / "trace.json"), "-o", str(page)]
    code, _, err = call("graph", "view", str(folder / "step.json"), *flags)
    assert code == 0, err
    assert '"name": "measured"' in page.read_text()


def test_a_run_is_reported(run: Run) -> None:
    code, _, err = call(*run.arguments())
    assert code == 0, err
    page = run.folder / "report.html"
    code, out, err = call("report", str(run.folder / "out"), "-o", str(page))
    assert (code, out) == (0, f"wrote {page}\n"), err
    text = page.read_text()
    assert '"name": "measured"' in text, "a step is shown without having been asked for"
    assert '["family", "llama"]' in text


def test_a_trace_that_cannot_be_written_is_refused_before_training(run: Run) -> None:
    (run.folder / "file").touch()
    message = run.refused(trace=str(run.folder / "file" / "trace"))
    assert "file/trace cannot be made: Not a directory; name another with --trace" in message


def test_every_setting_is_a_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {
        "model": "m",
        "data": "d.txt",
        "validation_split": 0.1,
        "output": "o",
        "gpu_memory": "24GiB",
        "cpu_memory": "100 GB",
        "batch_size": 6,
        "seq_len": 9,
        "packing": True,
        "lr": 1e-3,
        "beta1": 0.5,
        "beta2": 0.6,
        "optimizer": "adamw",
        "eps": 1e-6,
        "weight_decay": 0.1,
        "device": "cuda",
        "compute": "fp32",
        "policy": "fifo",
        "micro_batch": 3,
        "window": 2,
        "threads": 5,
        "deterministic": True,
        "steps": 7,
        "seed": 8,
        "checkpoint_every": 5,
        "keep_checkpoints": 6,
        "evaluate_every": 7,
        "patience": 8,
        "log_every": 4,
        "trace": "t",
        "tensorboard": "b",
        "wandb": "project",
        "schedule": "wsd",
        "warmup_steps": 2,
        "min_lr": 1e-5,
        "nvme": "disk",
        "nvme_memory": "2GiB",
        "nvme_write_limit": "1GiB",
        "nvme_checksums": False,
        "accumulate": 2,
        "max_grad_norm": 2.0,
        "skip_nonfinite": True,
        "label_smoothing": 0.1,
        "z_loss": 0.001,
        "decay_steps": 2,
    }
    # Those that exclude others, and "cycles", which belongs to another schedule.
    assert {*given, "epochs", "validation", "cycles"} == set(FLAGS)
    seen: list[Config] = []

    def capture(self: Trainer, *_: Any) -> None:
        seen.append(self.config)
        raise SystemExit(0)

    monkeypatch.setattr(Trainer, "train", capture)
    arguments = [f"{flag_name(n)}={v}" for n, v in given.items() if not isinstance(v, bool)]
    switches = ("--deterministic", "--packing", "--no-nvme-checksums", "--skip-nonfinite")
    code, _, err = call("train", *arguments, *switches)
    assert code == 0, err
    assert seen == [load_config(None, given)]


def test_the_commands_of_others_follow_the_same_rules() -> None:
    code, out, _ = call("--help")
    assert code == 0
    for name in ("train", "plan", "simulate", "bench", "graph", "policies"):
        assert re.search(rf"^│ {name} ", out, re.MULTILINE)
    code, _, err = call("simulate", "--shape", "no-such-shape")
    assert code == 1
    assert re.fullmatch(r"error: .*no-such-shape.*\n", err)


def test_help_describes_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = call("train", "--help")
    assert code == 0
    for name in FLAGS:
        assert flag_name(name) in out
    assert "puts together. Default: 8." in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--batchsize", "2"], "--batchsize"),
        (["train", "--steps", "many"], "--steps"),
        (["fly"], "fly"),
    ],
)
def test_wrong_usage_leaves_with_2(arguments: list[str], words: str) -> None:
    code, _, err = call(*arguments)
    assert code == 2
    assert words in err
    assert "Traceback" not in err


# -- bad input -----------------------------------------------------------------------------------


def test_no_checkpoint(run: Run) -> None:
    assert "/no does not exist" in run.refused(model=str(run.folder / "no"))
    assert "has no config.json" in run.refused(model=str(run.folder))


def test_half_a_checkpoint(run: Run, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = write_checkpoint(tmp_path_factory.mktemp("half"), sharded=True)
    shards = sorted(folder.glob("*.safetensors"))
    text = shards[0].read_bytes()
    shards[0].write_bytes(text[:-100])
    assert str(shards[0]) in run.refused(model=str(folder))
    shards[0].unlink()
    assert f"lacks 1 of the {len(shards)} shards" in run.refused(model=str(folder))
    for path in folder.glob("model*"):
        path.unlink()
    assert "was the download complete?" in run.refused(model=str(folder))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.to(torch.int32), "is stored as I32, supported are"),
        (lambda w: w[:, :-1].contiguous(), "has shape [64, 63], config.json asks for [64, 64]"),
    ],
    ids=["dtype", "shape"],
)
def test_a_wrong_tensor(
    run: Run,
    tmp_path_factory: pytest.TempPathFactory,
    change: Callable[[torch.Tensor], torch.Tensor],
    words: str,
) -> None:
    folder = write_checkpoint(tmp_path_factory.mktemp("wrong"))
    path, key = folder / "model.safetensors", "model.layers.1.self_attn.q_proj.weight"
    tensors = load_file(path)
    tensors[key] = change(tensors[key])
    save_file(tensors, path, {"format": "pt"})
    message = run.refused(model=str(folder))
    assert f"{path}: tensor {key} {words}" in message


def test_an_unknown_architecture(run: Run, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = write_checkpoint(tmp_path_factory.mktemp("mamba"))
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "model_type": "mamba"}))
    assert "model_type 'mamba' is not supported: supported are llama" in run.refused(
        model=str(folder)
    )


def test_data(run: Run) -> None:
    lines = run.folder / "lines.jsonl"
    assert "there is no such file" in run.refused(data=str(lines))
    lines.touch()
    assert "is empty; nothing to train on" in run.refused(data=str(lines))
    write_lines(lines, {"text": "good"})
    with lines.open("a") as file:
        file.write('{"text": "half\n')
    assert f"{lines}, line 2: malformed JSON at column" in run.refused(data=str(lines))
    write_lines(lines, {"text": "good"}, {"prompt": "a"})
    assert f"{lines}, line 2: the keys ('prompt') are those of no accepted form" in run.refused(
        data=str(lines)
    )


def test_a_sequence_beyond_the_model(run: Run) -> None:
    message = run.refused(seq_len="65")
    assert message == (
        "error: seq_len is 65, but the model has positions for 64; use --seq-len 64 or less"
    )


def test_a_budget_that_is_too_small_names_one_that_works(run: Run) -> None:
    message = run.refused(gpu_memory="2MiB")
    least = re.search(r"the least that works is --gpu-memory (\d+)MiB", message)
    assert least
    assert "no plan fits 2 MiB of GPU memory" in message
    assert "no plan fits" in run.refused(gpu_memory=f"{int(least[1]) - 1}MiB")
    code, _, err = call(*run.arguments(gpu_memory=f"{least[1]}MiB"))
    assert code == 0, err


def test_a_budget_beyond_the_machine_is_not_that_of_the_plan(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(this_machine, "host_memory", lambda: 3 << 30)
    code, _, err = call(*run.arguments(cpu_memory="900GiB"))
    assert code == 0, err
    assert "cpu_memory is 900.00 GiB, but there are 3.00 GiB here" in err
    assert re.search(r"^ *host +\S+ GiB +3\.00 GiB *$", err, re.MULTILINE)


def test_output(run: Run) -> None:
    assert "cannot be created in /proc" in run.refused(output="/proc/out")
    folder = run.folder / "full"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    assert f"output folder {folder} is not empty" in run.refused(output=str(folder))
    assert (folder / "notes.txt").read_text() == "mine"


def test_no_cuda(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = run.refused(device="cuda")
    assert "device is 'cuda', but" in message
    assert "use --device cpu" in message


def test_settings(run: Run) -> None:
    assert "policy" in run.refused(policy="no-such-policy")
    path = run.folder / "run.yaml"
    path.write_text("batchsize: 4\nlr: high\n")
    code, _, err = call("train", "--config", str(path), "--model", "m", "--data", "d")
    assert code == 1
    assert set(err.splitlines()) == {
        "error: output is not set; give it as --output or in the YAML file",
        f"error: {path}: lr is 'high': it should be a valid number, unable to parse string as a "
        "number; the default is 1e-05",
        f"error: {path}: unknown setting 'batchsize'; did you mean 'batch_size'?",
    }


def test_a_failing_step_is_named_and_nothing_is_saved(
    run: Run, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = write_checkpoint(tmp_path_factory.mktemp("broken"))
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][0] = float("inf")
    save_file(tensors, path, {"format": "pt"})
    assert "finite" in run.refused(model=str(folder))


def test_debug_shows_where_an_error_came_from(run: Run) -> None:
    code, _, err = call("--debug", *run.arguments(seq_len="65"))
    assert code == 1
    assert "Traceback (most recent call last)" in err
    assert err.splitlines()[-1].startswith("error: seq_len is 65")


def test_an_error_of_ours_is_one_line_too(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("division\nby zero")

    monkeypatch.setattr(Trainer, "train", broken)
    message = run.refused()
    assert message.startswith("error: unexpected ZeroDivisionError: division by zero (this is a")
    assert "--debug" in message
    _, _, err = call("--debug", *run.arguments())
    assert "Traceback (most recent call last)" in err


@pytest.mark.parametrize("command", ["resume", "report"])
def test_what_the_system_refuses_is_no_bug(command: str) -> None:
    code, _, err = call(command, "x" * 300)
    assert code == 1
    assert err.startswith("error: '")
    assert err.endswith(": File name too long\n")
    assert len(err) < 200


def test_what_an_encoding_lacks_is_escaped(model: Path, tmp_path: Path) -> None:
    data = os.fsencode(tmp_path) + b"/\xff.jsonl"
    command = [sys.executable, "-m", "slideformer.tools", "plan", "--model", str(model)]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    flags = ["--cpu-memory", "3GiB", "--gpu-memory", "3GiB", "--seq-len", "16"]
    plan = subprocess.run([*command, *flags], env=environment, capture_output=True, check=True)
    assert rb"\xd7 16 tokens" in plan.stdout
    stats = [*command[:3], "data", "stats", data, "--model", str(model)]
    refused = subprocess.run(stats, env=environment, capture_output=True, check=False)
    assert refused.returncode == 1
    assert refused.stderr.endswith(rb"\udcff.jsonl: there is no such file; check the path" + b"\n")


# -- Ctrl-C --------------------------------------------------------------------------------------


def interrupted(run: Run, times: int) -> tuple[int, str]:
    """Exit code and stderr of a long run that gets SIGINT during its third step."""
    # Steps long enough that both signals arrive within one.
    arguments = run.arguments(steps="100000", batch_size="256")
    command = [sys.executable, "-m", "slideformer.tools", *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        seen = []
        for line in process.stderr:
            seen.append(line)
            first = line.startswith("step 2/")
            second = times == 2 and "Ctrl-C: finishing" in line
            if first or second:
                process.send_signal(signal.SIGINT)
        return process.wait(timeout=60), "".join(seen)


def test_ctrl_c_saves_and_leaves_with_130_and_resume_goes_on(run: Run) -> None:
    code, err = interrupted(run, times=1)
    assert code == 130, err
    assert "Traceback" not in err
    output = run.folder / "out"
    done = re.fullmatch(
        r"interrupted after step (\d+); the model is saved; "
        rf"`slideformer resume {re.escape(str(output))}` goes on from here",
        err.splitlines()[-1],
    )
    assert done
    lines = (output / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == int(done[1])
    assert (output / "model.safetensors.index.json").is_file()

    exported = run.folder / "exported"
    code, out, err = call("export", str(output), "-o", str(exported))
    assert (code, out) == (0, f"saved {exported}: the weights of step {done[1]}\n"), err
    weights = sorted(path.name for path in exported.glob("*.safetensors"))
    assert weights
    for name in weights:
        assert (exported / name).read_bytes() == (output / name).read_bytes()


def test_resume_takes_a_run_and_the_settings_that_may_change(run: Run) -> None:
    code, _, err = call(*run.arguments(checkpoint_every="2"))
    assert code == 0, err
    checkpoint = run.folder / "out-checkpoints" / "step-2"
    output = run.folder / "again"
    code, out, err = call("resume", str(checkpoint), "--output", str(output), "--window", "3")
    assert code == 0, err
    assert out.startswith(f"saved {output}: 3 steps")
    assert "step 3/3" in err
    assert "step 2/3" not in err
    assert load_config(output / CONFIG_FILE, {}).window == 3
    code, _, err = call("resume", str(run.folder / "nowhere"))
    assert code == 1
    assert "nowhere has no checkpoint to resume from: give the output folder" in err
    code, _, err = call("resume", str(checkpoint), "--lr", "1e-3")
    assert code == 2


def test_a_second_ctrl_c_leaves_with_130_and_no_checkpoint(run: Run) -> None:
    code, err = interrupted(run, times=2)
    assert code == 130, err
    assert "Traceback" not in err
    assert err.splitlines()[-1] == "error: interrupted"
    assert sorted(path.name for path in run.folder.iterdir()) == ["text.txt"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_before_the_first_step_leaves_nothing(
    run: Run, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = run.folder / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    (run.folder / "text.txt").write_text("Long enough to be read for a while. " * 1_000_000)
    command = [sys.executable, "-m", "slideformer.tools", *run.arguments()]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if "tokenising" in line:
                process.send_signal(number)
        assert process.wait(timeout=60) == 130
    assert lines[-1] == "error: interrupted\n"
    assert sorted(path.name for path in run.folder.iterdir()) == ["cache", "text.txt"]
    assert list((cache / "slideformer" / "tokens").iterdir()) == []


@pytest.mark.parametrize(
    ("loading", "number"),
    [
        ("slideformer.tools.console", signal.SIGINT),
        ("pydantic", signal.SIGTERM),
        ("typer", signal.SIGINT),
    ],
)
def test_an_interrupt_while_the_program_is_loading(loading: str, number: signal.Signals) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "slideformer.tools", "plan", "--help"]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if line.rpartition("|")[2].strip() == loading:
                process.send_signal(number)
        assert process.wait(timeout=60) == 130
    assert lines[-1] == "error: interrupted\n"


# -- plan ----------------------------------------------------------------------------------------


def test_plan_needs_only_the_config_and_prints_to_stdout(model: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((model / "config.json").read_text())
    flags = ["--batch-size=4", f"--seq-len={SEQ_LEN}", "--gpu-memory=2GiB", "--micro-batch=2"]
    code, out, err = call("plan", "--model", str(tmp_path), *flags)
    assert code == 0, err
    assert "steps of 4 × 32 tokens in BF16" in out
    assert re.search(r"micro-batches +2 of 2 rows", out)
    assert re.search(r"host +2\.0\d GiB +[\d.]+ GiB \(what is free\)", out)
    assert re.search(r"gpu +[\d.]+ [MG]iB +2\.00 GiB", out)
    assert re.search(r"Estimate for a generic machine .* tokens/s", out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json"]


def test_plan_shows_deferred_updates_and_accumulation(model: Path) -> None:
    flags = ["--batch-size=2", "--accumulate=3", f"--seq-len={SEQ_LEN}", "--gpu-memory=2GiB"]
    code, out, err = call("plan", "--model", str(model), *flags, "--max-grad-norm=1")
    assert code == 0, err
    assert "steps of 6 × 32 tokens" in out
    assert re.search(r"gradients +all wait until their norm is known, [\d.]+ [KM]iB", out)
    assert "deferred to the next forward" in re.sub(r"\s+", " ", out)
    assert re.search(r"tokens/s; without clipping and skipping, the same plan takes \d", out)
    code, out, _ = call("plan", "--model", str(model), *flags)
    assert "deferred" not in out


def test_plan_of_a_run_from_its_file(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        f"model: {model}\ndata: missing.txt\nsteps: 3\nlora: {{rank: 2, alpha: 4}}\n"
        f"batch_size: 2\nseq_len: {SEQ_LEN}\ngpu_memory: 2GiB\n"
    )
    code, out, err = call("plan", "--config", str(path), "--batch-size=4")
    assert code == 0, err
    assert "steps of 4 × 32 tokens in BF16" in out
    assert re.search(r"in 3 layers, [\d,]+ of them trained", out)
    assert re.search(r"resident +.*adapters of 3 layers", out)
    path.write_text("modle: x\n")
    code, _, err = call("plan", "--config", str(path))
    assert code == 1
    assert "unknown setting 'modle'; did you mean 'model'?" in err
    assert "model is not set; give it as --model or in the YAML file" in err


def test_plan_refuses_as_train_does(model: Path) -> None:
    code, out, err = call("plan", "--model", str(model), "--seq-len=32", "--gpu-memory=1MiB")
    assert (code, out) == (1, "")
    assert err.startswith("error: no plan fits 1 MiB of GPU memory")


# -- the bar -------------------------------------------------------------------------------------


def test_a_terminal_gets_a_bar(model: Path, tmp_path: Path) -> None:
    settings = {"steps": 3, "batch_size": 2, "seq_len": SEQ_LEN, "device": "cpu"}
    data, output = write_text(tmp_path / "text.txt"), tmp_path / "out"
    config = load_config(None, {**settings, "model": model, "data": data, "output": output})
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=220)
    Trainer(config).train(ConsoleProgress(console))
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())
    assert "Plan: llama" in text
    last = [line for line in text.splitlines() if "3/3" in line][-1]
    assert re.search(
        r"loss \d\.\d{3} \(\d\.\d{3}\)  norm \S+  lr \S+  [\d,]+ tokens/s +host \d", last
    )


def test_on_a_measured_machine_the_speed_is_a_share_of_its_peak(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from slideformer.tools import progress

    profile = replace(load_machine("a100").profile, flops=1e9)
    machine = replace(load_machine("a100"), profile=profile)
    monkeypatch.setattr(progress, "cached_machine", lambda _: machine)
    code, _, err = call(*run.arguments())
    assert code == 0, err
    assert re.search(r"step 3/3 .* [\d,]+ tokens/s \(\d+% of peak\)  ", err)
