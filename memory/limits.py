"""What this process may use: host memory within its container's limit, and space on NVMe."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import psutil

from slideformer.graph.errors import StoreError

_MOUNT = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")


class _Version(NamedTuple):
    """Where a version of control groups keeps a limit, a usage, and the cached files in it."""

    root: str
    limit: str
    usage: str
    cached: str


_V2 = _Version("", "memory.max", "memory.current", "inactive_file")
_V1 = _Version("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")

_MARGIN = 0.95


def available_host_memory() -> int:
    """Bytes that may be used, 5 % kept back; respects the limits of control groups v2 and v1.

    The limits of containers, services and batch systems are such groups. What a virtual machine
    has, and that is what WSL has, is all that the system reports. Cached files that would give way
    do not count as used.
    """
    room = psutil.virtual_memory().available
    for version, folder in _groups():
        limit, usage = _number(folder / version.limit), _number(folder / version.usage)
        if limit is not None and usage is not None:
            room = min(room, max(0, limit - usage + _cached(version, folder)))
    return int(room * _MARGIN)


def host_memory() -> int:
    """Bytes of memory that there are at all, within the limits of control groups."""
    limits = (_number(folder / version.limit) for version, folder in _groups())
    return min([psutil.virtual_memory().total, *(limit for limit in limits if limit is not None)])


def _groups() -> Iterator[tuple[_Version, Path]]:
    """This process's memory groups, with those around them.

    A container that has no view of its path finds its own group where the groups are mounted.
    """
    try:
        lines = _MEMBERSHIP.read_text().splitlines()
    except OSError:
        lines = []
    found = {(_V2, _MOUNT): None, (_V1, _MOUNT / _V1.root): None}
    for line in lines:
        number, controllers, path = line.split(":", 2)
        version = _V2 if number == "0" else _V1
        if version is _V2 or "memory" in controllers.split(","):
            inside = PurePosixPath(path.lstrip("/"))
            for each in (inside, *inside.parents):
                found[version, _MOUNT / version.root / each] = None
    yield from found


def _cached(version: _Version, folder: Path) -> int:
    """Bytes of files that a group counts as used, and gives up for other use."""
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    known = dict(line.split(" ", 1) for line in lines if " " in line)
    return int(known.get(version.cached, 0))


def free_nvme(folders: Sequence[Path], stale: Callable[[Path], int]) -> int:
    """Bytes that may be used in folders of equal shares, 5 % kept back.

    Folders on one disk share what is free there. ``stale`` tells how many bytes of a folder a run
    gives back when it begins, those of killed runs. Raises `StoreError` for a folder that is not
    there or has nothing free.
    """
    try:
        disks = [os.stat(folder).st_dev for folder in folders]
        free = {os.stat(folder).st_dev: shutil.disk_usage(folder).free for folder in folders}
        for folder in {folder.resolve() for folder in folders}:
            free[os.stat(folder).st_dev] += stale(folder)
    except OSError as error:
        raise StoreError(
            f"NVMe folder {error.filename} cannot be used ({error.strerror}); create it or give "
            "another one as --nvme"
        ) from error
    shares = [free[disk] // disks.count(disk) for disk in disks]
    if 0 in shares:
        raise StoreError(
            f"NVMe folder {folders[shares.index(0)]} has nothing free; free some, give another "
            "folder as --nvme, or as --nvme-memory what will be free"
        )
    return int(len(folders) * min(shares, default=0) * _MARGIN)


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such group, or "max"
        return None
