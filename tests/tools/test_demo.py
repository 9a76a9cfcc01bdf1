"""The demonstration, shortened: it runs through, twice, and the model learns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slideformer.tools.demo import reference_text, run_demo


def test_it_replaces_an_earlier_run_and_the_loss_falls(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "demo"
    (folder / "tuned").mkdir(parents=True)
    (folder / "tuned" / "earlier").touch()
    run_demo(folder, steps=12, batch_size=8, seq_len=64)
    out, err = capsys.readouterr()
    order = ["Wrote a Llama", "Before: The ", f"Saved {folder / 'tuned'}", "After: The "]
    assert sorted(order, key=out.index) == order
    assert "Plan: llama" in err
    assert "step 12/12" in err
    lines = (folder / "tuned" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert losses[-1] < losses[0] - 1.5


def test_the_text_is_prose_of_the_reference() -> None:
    text = reference_text()
    assert len(text) > 200_000
    assert "garbage collection" in text
    assert "|" not in text
