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
from slideformer.memory.limits import available_host_memory, free_nvme, host_memory


def group(folder: Path, limit: str | None, usage: str | None, *, v1: bool = False) -> None:
    """A control group with this limit and usage; None leaves a file out."""
    names = ("limit_in_bytes", "usage_in_bytes") if v1 else ("max", "current")
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip(names, (limit, usage), strict=True):
        if value is not None:
            (folder / f"memory.{name}").write_text(value)


@pytest.fixture(autouse=True)
def mount(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where groups are mounted; there are none yet, and the process is in none."""
    monkeypatch.setattr(limits, "_MOUNT", tmp_path / "cgroup")
    monkeypatch.setattr(limits, "_MEMBERSHIP", tmp_path / "membership")
    return tmp_path / "cgroup"


@pytest.fixture(autouse=True)
def available(monkeypatch: pytest.MonkeyPatch) -> int:
    """A machine with 1,000,000 bytes available."""
    room = 1_000_000
    memory = psutil.virtual_memory()._replace(available=room)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    return room


@pytest.mark.parametrize("v1", [False, True])
@pytest.mark.parametrize(
    ("limit", "usage", "room"),
    [
        (None, None, 1_000_000),
        ("max\n", "5\n", 1_000_000),
        ("500000\n", "100000\n", 400_000),
        ("9000000\n", "100000\n", 1_000_000),
        ("500000\n", "600000\n", 0),
        ("500000\n", None, 1_000_000),
    ],
)
def test_the_limit_of_a_container_counts(
    mount: Path, v1: bool, limit: str | None, usage: str | None, room: int
) -> None:
    group(mount / "memory" if v1 else mount, limit, usage, v1=v1)
    assert available_host_memory() == int(room * 0.95)


def test_all_memory_is_that_of_the_machine_or_of_its_tightest_group(mount: Path) -> None:
    total = psutil.virtual_memory().total
    assert host_memory() == total
    group(mount, f"{total - 5}\n", "1\n")
    assert host_memory() == total - 5
    group(mount / "memory", f"{total - 7}\n", None, v1=True)
    assert host_memory() == total - 7


def test_the_tightest_of_all_groups_around_counts(mount: Path) -> None:
    limits._MEMBERSHIP.write_text("0::/jobs/job.7/step\n")
    group(mount, None, None)
    group(mount / "jobs", "800000", "0")
    group(mount / "jobs" / "job.7", "300000", "100000")
    group(mount / "jobs" / "job.7" / "step", "max", "100000")
    group(mount / "jobs" / "job.8", "10", "0")
    assert available_host_memory() == 190_000


def test_of_version_1_the_memory_group_counts(mount: Path) -> None:
    limits._MEMBERSHIP.write_text("4:cpu,cpuacct:/tight\n3:memory:/job\n0::/\n")
    group(mount / "memory" / "job", "400000", "0", v1=True)
    group(mount / "memory" / "tight", "10", "0", v1=True)
    assert available_host_memory() == 380_000


@pytest.mark.parametrize(("v1", "name"), [(False, "inactive_file"), (True, "total_inactive_file")])
def test_cached_files_give_way(mount: Path, v1: bool, name: str) -> None:
    folder = mount / "memory" if v1 else mount
    group(folder, "500000", "450000", v1=v1)
    (folder / "memory.stat").write_text(f"anon 50000\n{name} 350000\nactive_file 7\n")
    assert available_host_memory() == 380_000


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
    free[2] = 0
    with pytest.raises(StoreError, match=r"other has nothing free; free some, .* --nvme-memory"):
        free_nvme([one, other], stale)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"no-such cannot be used \(No such file or directory\)"):
        free_nvme([tmp_path / "no-such"], lambda _: 0)
