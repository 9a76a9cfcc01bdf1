"""What this process may use: host memory within its container's limit, and space on NVMe."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from slideformer.graph.errors import StoreError

_CGROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
    ),
)
_MARGIN = 0.95


def available_host_memory() -> int:
    """Bytes that may be used, 5 % kept back; respects the limits of control groups v2 and v1."""
    room = psutil.virtual_memory().available
    for limit_file, usage_file in _CGROUP_FILES:
        limit, usage = _read_number(limit_file), _read_number(usage_file)
        if limit is not None and usage is not None:
            room = min(room, max(0, limit - usage))
    return int(room * _MARGIN)


def free_nvme(folders: Sequence[Path], stale: Callable[[Path], int]) -> int:
    """Bytes that may be used in folders of equal shares, 5 % kept back.

    Folders on one disk share what is free there. ``stale`` tells how many bytes of a folder a run
    gives back when it begins, those of killed runs. Raises `StoreError` for a folder that is not
    there.
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
    share = min((free[disk] // disks.count(disk) for disk in disks), default=0)
    return int(len(folders) * share * _MARGIN)


def _read_number(path: str) -> int | None:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):  # no such group, or "max"
        return None
