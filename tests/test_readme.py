"""What README and docs/training.md show runs: Python as it stands, commands up to the training."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from slideformer.measuring import profiling
from slideformer.tools.cli import app
from slideformer.trainer import Trainer
from tests.support.checkpoints import write_checkpoint, write_lines

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TRAINING = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
PROGRAMS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    shlex.split(command.replace("\\\n", " "), comments=True)
    for command in re.findall(
        r"^    \.venv/bin/slideformer ((?:.*\\\n)*.*)$", README + TRAINING, re.MULTILINE
    )
]


GRAPHS = [command for command in COMMANDS if command[0] in ("simulate", "graph", "policies")]
RUNS = [command for command in COMMANDS if command not in GRAPHS]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory in which the README's names exist, on a small scale."""
    monkeypatch.chdir(tmp_path)
    write_checkpoint(Path("models/Llama-3.1-8B"), max_position_embeddings=1024)
    write_lines(Path("train.jsonl"), *[{"text": "A text to learn."}] * 10)
    Path("run.yaml").write_text(
        "model: models/Llama-3.1-8B\ndata: train.jsonl\noutput: tuned\n"
        "batch_size: 1\nseq_len: 16\ndevice: cpu\n"
    )
    return tmp_path


@pytest.mark.parametrize("program", PROGRAMS, ids=["trainer", "engine"])
def test_a_program_runs(program: str, folder: Path) -> None:
    exec(compile(program, "README.md", "exec"), {})
    AutoModelForCausalLM.from_pretrained(folder / "tuned")


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("command", RUNS, ids=lambda command: str(command[0]))
def test_a_command_is_understood(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def capture(given: Any, *_: Any) -> None:
        seen.append(given)
        raise SystemExit(0)

    monkeypatch.setattr(Trainer, "train", capture)
    monkeypatch.setattr(profiling, "measure_machine", capture)
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.stderr
    assert seen or "predicted peak" in result.stdout


def test_the_examples_were_found() -> None:
    assert len(PROGRAMS) == 2
    assert [command[0] for command in RUNS] == ["train", "plan", "profile"]
    assert len(GRAPHS) == 6


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#]+)", README)
    paths = re.findall(r"`((?:graph|memory|runtime|models|kernels|slideformer)/[\w/.]*)`", README)
    missing = [path for path in {*targets, *paths} if not (ROOT / path).exists()]
    assert len(paths) > 8
    assert missing == []


def test_the_commands_of_graphs_work_one_after_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    smaller = {"mistral-large-123b": "llama3-1b", "llama3-8b": "llama3-1b", "FOLDER/": ""}
    predicted = ["graph", "trace", "step.json", "-o", "trace.json"]  # stands for a measured one
    for command in [*GRAPHS[:-1], predicted, GRAPHS[-1]]:
        for large, small in smaller.items():
            command = [part.replace(large, small) for part in command]
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, (command, result.stderr)
    assert '"name": "measured"' in Path("step.html").read_text()
