"""Host memory of processes: what is shared counts once, and the peak is not missed."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from pathlib import Path

from slideformer.tools.host_memory import HostPeak, process_bytes, tree_bytes


def test_the_peak_is_seen_after_the_memory_is_gone() -> None:
    size = 64 << 20
    before = process_bytes(os.getpid())
    peak = HostPeak(os.getpid(), interval=60)
    held = bytearray(os.urandom(4096)) * (size // 4096)
    assert peak.sample() > before + 0.9 * size
    del held
    assert peak.sample() < before + 0.5 * size
    peak.close()
    assert peak.peak > before + 0.9 * size


def test_pages_shared_with_a_child_count_once(tmp_path: Path) -> None:
    size = 64 << 20
    path = tmp_path / "shared"
    path.write_bytes(os.urandom(4096) * (size // 4096))
    program = (
        "import mmap, sys\n"
        "with open(sys.argv[1], 'r+b') as file, mmap.mmap(file.fileno(), 0) as shared:\n"
        "    print(sum(shared[::4096]), flush=True)\n"
        "    sys.stdin.read()\n"
    )
    alone = process_bytes(os.getpid())
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as shared:
        touched = sum(shared[::4096])
        before = process_bytes(os.getpid())
        with subprocess.Popen(
            [sys.executable, "-c", program, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as child:
            assert child.stdout is not None
            assert int(child.stdout.readline()) == touched
            both, one = tree_bytes(os.getpid()), process_bytes(os.getpid())
            child.communicate()
    assert before > alone + 0.9 * size
    assert one < before - 0.4 * size  # half of them are the child's
    assert abs(both - before) < 0.4 * size
