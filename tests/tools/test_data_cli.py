"""``slideformer data stats`` on small files."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from slideformer.models.data.byte_tokenizer import save_byte_tokenizer
from slideformer.tools.cli import app
from tests.support.checkpoints import write_lines, write_text


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the tokenizer of bytes; the weights are not needed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    save_byte_tokenizer(tmp_path / "model")
    return tmp_path / "model"


def test_a_table_has_a_column_for_each_file(model: Path, tmp_path: Path) -> None:
    records = write_lines(tmp_path / "some.jsonl", *[{"text": "x" * n} for n in (3, 7, 40)])
    text = write_text(tmp_path / "text.txt")
    files = [str(records), str(text)]
    done = CliRunner().invoke(app, ["data", "stats", *files, "--model", str(model), "--seq-len=16"])
    assert done.exit_code == 0, done.stderr
    cells = [line.split() for line in done.stdout.splitlines()]
    assert [row[-2:] for row in cells[:3]] == [
        ["some.jsonl", "text.txt"],
        ["3", "113"],
        ["28", "1,801"],
    ]
    figures = {" ".join(row[:-2]): row[-2:] for row in cells if row}
    assert figures["documents cut off"] == ["1", "0"]
    assert figures["tokens lost"] == ["25", "0"]
    assert figures["longest"] == ["41", "16"]
    assert figures["packed: rows"] == ["2", "113"]
    assert [row[-2:] for row in cells if row and row[0] == "padding"] == [
        ["41.7%", "0.4%"],
        ["12.5%", "0.4%"],
    ]


def test_errors_are_one_line(model: Path, tmp_path: Path) -> None:
    path = str(tmp_path / "none.jsonl")
    done = CliRunner().invoke(app, ["data", "stats", path, "--model", str(model)])
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr == f"error: {path}: there is no such file; check the path\n"
