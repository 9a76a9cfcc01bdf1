"""How much memory there is within the limits of containers, and how much room on NVMe."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from slideformer.graph.errors import StoreError
from slideformer.memory import limits
from slideformer.memory.limits import available_host_memory, free_nvme


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


def test_folders_on_one_disk_share_its_room_and_what_killed_runs_left_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    one, two, other = (tmp_path / name for name in ("one", "two", "other"))
    for folder in (one, two, other):
        folder.mkdir()
    disks = {one: 1, two: 1, other: 2}
    real, free = os.stat, {1: 1000, 2: 800}

    def stat(path: Path, **options: bool) -> object:
        known = disks.get(path)
        return SimpleNamespace(st_dev=known) if known else real(path, **options)

    def usage(path: Path) -> object:
        return SimpleNamespace(free=free[disks[path]])

    def stale(path: Path) -> int:
        return 200 if path == two else 0

    monkeypatch.setattr(limits, "os", SimpleNamespace(stat=stat))
    monkeypatch.setattr(shutil, "disk_usage", usage)
    assert free_nvme([], stale) == 0
    assert free_nvme([one], stale) == 950
    assert free_nvme([two], stale) == 1140
    assert free_nvme([one, two], stale) == 1140
    assert free_nvme([one, two, other], stale) == 3 * 570
    assert free_nvme([other, one], stale) == 2 * 760


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"no-such cannot be used \(No such file or directory\)"):
        free_nvme([tmp_path / "no-such"], lambda _: 0)
