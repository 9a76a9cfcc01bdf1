"""The benchmark of checkpoints trains with one being written, and leaves nothing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from slideformer.tools.bench import checkpoints

ARGUMENTS = ["--shape", "tiny", "--batch-size", "2", "--seq-len", "16", "--device", "cpu"]


@pytest.mark.parametrize("more", [[], ["--snapshot"]])
def test_a_checkpoint_is_timed_against_the_disk(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        checkpoints.main(
            [*ARGUMENTS, "--folder", str(tmp_path), "--steps", "3", "--plain", "8MiB", *more]
        )
    assert not left.value.code
    out = capsys.readouterr().out
    assert re.search(r"^a checkpoint has \S+ MiB; the disk writes [\d.]+, [\d.]+ GB/s", out)
    assert re.search(r"^a step takes [\d.]+ s; with a checkpoint .* [-\d.]+ s more$", out, re.M)
    assert re.search(r"^that is [-\d.]+ of the [\d.]+ s that the bytes take", out, re.M)
    assert re.search(r"^it was in its place [\d.]+ s after", out, re.M)
    assert re.search(r"^with one every 50 steps, [-\d.]+ % of the time$", out, re.M)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no is not a folder"):
        checkpoints.main([*ARGUMENTS, "--folder", str(tmp_path / "no")])
