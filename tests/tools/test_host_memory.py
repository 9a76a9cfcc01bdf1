"""Host memory of processes: what is shared counts once, and the peak is not missed.

What is measured runs in an interpreter of its own: the share of a test process in the libraries
that it maps changes by hundreds of MiB when another test process begins or ends.
"""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from pathlib import Path

from slideformer.tools.host_memory import HostPeak, process_bytes, tree_bytes


def run_alone(check: str, *arguments: str) -> None:
    """Call a function of this module in an interpreter that loads nothing large."""
    program = f"import sys; from {__name__} import {check}; {check}(*sys.argv[1:])"
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", program, *arguments], cwd=root, check=True)


def test_the_peak_is_seen_after_the_memory_is_gone() -> None:
    run_alone("check_peak")


def test_pages_shared_with_a_child_count_once(tmp_path: Path) -> None:
    run_alone("check_shared_pages", str(tmp_path / "shared"))


def check_peak() -> None:
    size = 64 << 20
    before = process_bytes(os.getpid())
    peak = HostPeak(os.getpid(), interval=60)
    held = bytearray(os.urandom(4096)) * (size // 4096)
    assert peak.sample() > before + 0.9 * size
    del held
    assert peak.sample() < before + 0.5 * size
    peak.close()
    assert peak.peak > before + 0.9 * size


def check_shared_pages(name: str) -> None:
    size = 64 << 20
    path = Path(name)
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
