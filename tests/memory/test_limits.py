"""How much host memory there is, within the limits of containers."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from slideformer.memory import limits
from slideformer.memory.limits import available_host_memory


def groups(
    monkeypatch: pytest.MonkeyPatch, folder: Path, *values: tuple[str | None, str | None]
) -> None:
    """Control group files with these limits and usages; None leaves a file out."""
    files = []
    for number, pair in enumerate(values):
        paths = [folder / f"{number}.{name}" for name in ("limit", "usage")]
        for path, value in zip(paths, pair, strict=True):
            if value is not None:
                path.write_text(value)
        files.append((str(paths[0]), str(paths[1])))
    monkeypatch.setattr(limits, "_CGROUP_FILES", tuple(files))


@pytest.fixture(autouse=True)
def available(monkeypatch: pytest.MonkeyPatch) -> int:
    """A machine with 1,000,000 bytes available."""
    room = 1_000_000
    memory = psutil.virtual_memory()._replace(available=room)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    return room


@pytest.mark.parametrize(
    ("files", "room"),
    [
        ([], 1_000_000),
        ([(None, None)], 1_000_000),
        ([("max\n", "5\n")], 1_000_000),
        ([("500000\n", "100000\n")], 400_000),
        ([("9000000\n", "100000\n")], 1_000_000),
        ([("500000\n", "100000\n"), ("300000\n", "0\n")], 300_000),
        ([("500000\n", "600000\n")], 0),
        ([("500000\n", None)], 1_000_000),
    ],
)
def test_the_tightest_limit_counts(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    files: list[tuple[str | None, str | None]],
    room: int,
) -> None:
    groups(monkeypatch, tmp_path, *files)
    assert available_host_memory() == int(room * 0.95)
