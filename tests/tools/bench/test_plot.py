"""Curves of measured rows, on made-up reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from slideformer.graph.errors import ConfigError
from slideformer.tools.bench.plot import bench_plot, curves, main, read_points
from slideformer.tools.bench.rows import read_rows

ROWS = Path(__file__).parents[3] / "docs" / "benchmark-rows.yaml"


def row(batch: int, gpu: str, ours: float | None = 10.0, **summary: float) -> dict[str, Any]:
    measured = summary if ours is None else {"ours": ours, **summary}
    return {
        "row": {"shape": "tiny", "batch_size": batch, "gpu_memory": gpu, "baseline": "R1"},
        "summary": measured,
    }


def report(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"rows": rows}))
    return path


def test_curves_join_rows_that_differ_in_one_thing(tmp_path: Path) -> None:
    first = report(tmp_path / "a", row(4, "2GiB", 4.0, theirs=5.0), row(1, "2GiB", 1.0))
    second = report(tmp_path / "b", row(4, "1GiB", 3.0), row(8, "9GiB"), row(2, "2GiB", None))
    points = read_points([first, second])
    assert len(points) == 4, "one row was not measured"
    by_batch, by_gpu = curves(points, "batch"), curves(points, "gpu")
    assert {name: [p.ours for p in group] for name, group in by_batch.items()} == {
        "tiny, 2 GiB": [1.0, 4.0]
    }
    assert {name: [p.ours for p in group] for name, group in by_gpu.items()} == {
        "tiny, batch 4": [3.0, 4.0]
    }
    picture = tmp_path / "plot.svg"
    bench_plot([first, second], picture)
    assert "tokens/s" in picture.read_text() or picture.stat().st_size > 10_000


def test_what_cannot_be_drawn_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = report(tmp_path / "alone", row(4, "2GiB"))
    with pytest.raises(ConfigError, match="measure more rows"):
        bench_plot([alone], tmp_path / "plot.png")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(SystemExit, match="text: is not a report"):
        main([str(tmp_path / "text"), "--output", str(tmp_path / "plot.png")])


def test_the_published_rows_can_be_read() -> None:
    rows = read_rows(ROWS, {})
    assert len({(r.label, r.baseline) for r in rows}) == len(rows) > 10
