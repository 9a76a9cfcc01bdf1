"""Rows of a benchmark, from flags, from texts and from files."""

from __future__ import annotations

from pathlib import Path

import pytest

from slideformer.graph.errors import ConfigError
from slideformer.tools.bench.rows import parse_row, read_rows

BUDGETS = {"gpu_memory": "2GiB", "cpu_memory": "4GiB"}
TINY = {"shape": "tiny", "batch_size": 2, "seq_len": 16, **BUDGETS}


def test_a_row_takes_what_it_leaves_out_from_the_flags() -> None:
    common = {**TINY, "baseline": "R1", "settings": {"threads": 2}}
    row = parse_row("llama3-8b:32::104GiB:R4:window=3:seq_len=2048:deterministic=true", common)
    assert row.shape == "llama3-8b"
    assert (row.batch_size, row.seq_len, row.baseline) == (32, 2048, "R4")
    assert row.engine_settings() == {
        "batch_size": 32,
        "seq_len": 2048,
        "gpu_memory": 2 << 30,
        "cpu_memory": 104 << 30,
        "threads": 2,
        "window": 3,
        "deterministic": True,
    }


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("tiny:0", "batch_size"),
        ("tiny:two", "batch_size"),
        ("tiny:2:12G", "'12G' is not a size"),
        ("tiny:2:::R5", "baseline is 'R5'; known are R1"),
        ("tiny:2:::R1:fast", "'fast' is not name=value"),
    ],
)
def test_a_bad_row_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        parse_row(text, TINY)


def test_rows_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.yaml"
    path.write_text("- {batch_size: 4}\n- {baseline: R3, settings: {window: 2}}\n")
    first, second = read_rows(path, TINY)
    assert (first.batch_size, first.baseline) == (4, "R1")
    assert (second.baseline, second.settings) == ("R3", {"window": 2})
    path.write_text("- {batch: 4}\n")
    with pytest.raises(ConfigError, match="row 1: batch"):
        read_rows(path, TINY)
    path.write_text("shape: tiny\n")
    with pytest.raises(ConfigError, match="list of rows"):
        read_rows(path, TINY)
