"""Host memory of a process and its descendants: the peak of the sum of their PSS.

PSS counts a page that several processes map in equal parts, so the sum counts every page once;
pinned, shared and transparent huge pages are in it. Pages of hugetlbfs are not and are added. Where
the kernel does not tell PSS, RSS stands in, which counts shared pages once per process. Linux only.
Nothing here knows who used the memory for what.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path

import psutil

_FIELDS = ("Pss:", "Private_Hugetlb:", "Shared_Hugetlb:")
_SHARE = 0.02
"""Most of the time that may go into reading: the kernel walks all page tables for each reading."""


def tells_pss() -> bool:
    """Whether this system tells the PSS of processes."""
    return Path("/proc/self/smaps_rollup").exists()


def process_bytes(pid: int) -> int:
    """PSS (or RSS) and huge pages of one process in bytes; 0 if it is gone.

    Raises `PermissionError` for somebody else's process.
    """
    try:
        if not tells_pss():
            return int(psutil.Process(pid).memory_info().rss)
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except (FileNotFoundError, ProcessLookupError, psutil.NoSuchProcess):
        return 0
    lines = (line.split() for line in text.splitlines())
    return 1024 * sum(int(line[1]) for line in lines if line[0] in _FIELDS)


def tree_bytes(pid: int) -> int:
    """`process_bytes` of a process and all its descendants."""
    try:
        children = psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return 0
    return sum(process_bytes(each) for each in (pid, *(child.pid for child in children)))


class HostPeak:
    """Samples `tree_bytes` in a thread until it is closed, and keeps the highest.

    One sample every ``interval`` seconds, or less often where reading takes long. ``kind`` says
    what is measured, ``"PSS"`` or ``"RSS"``.
    """

    def __init__(self, pid: int, interval: float = 0.5) -> None:
        self._pid = pid
        self._interval = interval
        self._stop = threading.Event()
        self.kind = "PSS" if tells_pss() else "RSS"
        self.peak = tree_bytes(pid)
        self.samples = 1
        self._thread = threading.Thread(target=self._watch, name="host-peak", daemon=True)
        self._thread.start()

    def sample(self) -> int:
        """Take one sample now and return it."""
        found = tree_bytes(self._pid)
        self.peak = max(self.peak, found)
        self.samples += 1
        return found

    def close(self) -> None:
        """Stop sampling."""
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        wait = self._interval
        while not self._stop.wait(wait):
            started = time.perf_counter()
            self.sample()
            wait = max(self._interval, (time.perf_counter() - started) / _SHARE)
