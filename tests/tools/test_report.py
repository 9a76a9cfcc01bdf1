"""``slideformer report``: what is on the page, and what is said of folders that hold no run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from slideformer.graph.errors import DataError
from slideformer.tools.cli import app
from slideformer.tools.report.page import MAX_POINTS, curves
from slideformer.tools.report.run_folder import read_run
from tests.support.runs import metrics_of, write_run


def embedded(text: str, name: str) -> Any:
    found = re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', text, re.S)
    assert found is not None
    return json.loads(found[1])


def call(*arguments: str | Path) -> str:
    """Run the program, which succeeds."""
    done = CliRunner().invoke(app, [str(each) for each in arguments])
    assert done.exit_code == 0, done.stderr
    return done.stdout


def test_the_page_holds_curves_plan_settings_and_a_step(tmp_path: Path) -> None:
    run, path = write_run(tmp_path / "<run>", gpu_memory="24GiB"), tmp_path / "page.html"
    assert call("report", run, "-o", path, "--machine", "a100") == f"wrote {path}\n"
    text = path.read_text()
    assert "<title>&lt;run&gt;</title>" in text
    data = embedded(text, "run-data")
    assert data["summary"].startswith("30 steps; 30,000 tokens in 15 s; loss 3.8049 at first, 0.8")
    assert "1 steps skipped" in data["summary"]
    drawn = {curve["title"]: curve["series"] for curve in data["curves"]}
    assert list(drawn) == [
        "loss (nats per target token)",
        "gradient norm",
        "learning rate",
        "tokens per second",
    ]
    loss, smoothed, validation = drawn["loss (nats per target token)"]
    assert loss["x"] == [1, *range(3, 31)]
    assert (smoothed["name"], validation["name"]) == ("smoothed", "validation loss")
    assert validation["x"] == [1, 30]
    assert set(drawn["tokens per second"][0]["y"]) == {2000}
    plan, settings = (dict(table["rows"]) for table in data["tables"])
    assert plan == {
        "window": "3",
        "deferred": "False",
        "workspace": "3.00 MiB",
        "peak, gpu": "3.00 GiB",
        "resident": "head",
    }
    assert settings["lr"] == "0.0003"
    assert settings["gpu_memory"] == "24.00 GiB"
    assert "<b>.jsonl" in settings["data"]
    assert "beta1" not in settings
    assert [world["name"] for world in embedded(text, "data")["worlds"]] == [
        "predicted",
        "measured",
    ]


def test_without_a_trace_the_step_is_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    for name in ("step.json", "trace.json", "plan.json", "slideformer.yaml"):
        (run / name).unlink()
    call("report", run, "-o", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert embedded(text, "data") is None
    assert embedded(text, "run-data")["tables"][1]["rows"] == []


def test_the_step_may_lie_where_the_run_was_told_to_trace(tmp_path: Path) -> None:
    traced = write_run(tmp_path / "traced")
    run = write_run(tmp_path / "run", trace=traced)
    for name in ("step.json", "trace.json"):
        (run / name).unlink()
    assert read_run(run).step is not None


def test_a_trace_that_is_not_whole_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = write_run(tmp_path / "run")
    text = (run / "trace.json").read_text()
    (run / "trace.json").write_text(text[: len(text) // 2])
    assert read_run(run).step is None
    assert "trace.json: not a trace of this program" in caplog.text
    assert "the page shows no step" in caplog.text


def test_long_runs_are_thinned() -> None:
    found = {curve["title"]: curve["series"] for curve in curves(metrics_of(9000))}
    (rates,) = found["learning rate"]
    assert len(rates["x"]) == 1800 <= MAX_POINTS
    assert rates["x"][:2] == [5, 10]
    assert rates["y"][:2] == pytest.approx([3e-4, 8e-4])


def test_what_a_run_records_beside_has_a_curve_of_its_own() -> None:
    lines = [{"step": 1, "loss": 1.0, "perplexity": 2.0}, {"step": 2, "loss": 0.5}]
    assert [each["title"] for each in curves(lines)] == [
        "loss (nats per target token)",
        "perplexity",
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "metrics.jsonl: holds no step yet"),
        ("[1]\n", "line 1: holds no JSON object; is it of this program?"),
        ('{"step": 1}\n{"step"\n', "line 2: malformed JSON"),
        ("[" * 100_000, "line 1: malformed JSON"),
        ('{"loss": 1}\n', "line 1: has no 'step'; is it of this program?"),
    ],
)
def test_metrics_that_cannot_be_read(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(DataError, match=re.escape(words)):
        read_run(tmp_path)


def test_a_folder_without_a_run_is_one_line(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr == (
        f"error: {tmp_path}: holds no metrics.jsonl; give the output folder of a run of "
        "`slideformer train`, or one of its checkpoints\n"
    )
