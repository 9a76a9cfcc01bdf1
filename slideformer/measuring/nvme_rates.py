"""What a disk does for a plain loop of direct I/O, to measure the NVMe lanes against.

Shares no code with the store.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from slideformer.graph.errors import ConfigError

REQUEST = 4 << 20
"""Bytes of a request."""


def disk_rates(folder: Path, nbytes: int, threads: int) -> dict[str, float]:
    """Bytes/s of writing a file of ``nbytes``, reading it, and both at once (all bytes counted).

    ``threads`` threads each way, requests of 4 MiB, blocks that were written before. Raises
    `ConfigError` if the folder does not take such a file.
    """
    requests = max(nbytes // REQUEST, 1)
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix="slideformer-rate-") as file:
            os.posix_fallocate(file.fileno(), 0, 2 * requests * REQUEST)
            descriptor = os.open(file.name, os.O_RDWR | os.O_DIRECT)
            try:
                return _measure(descriptor, requests, threads)
            finally:
                os.close(descriptor)
    except OSError as error:
        raise ConfigError(
            f"{folder}: direct I/O on a file of {2 * nbytes:,} bytes is refused "
            f"({error.strerror or error}); give another folder or a smaller size"
        ) from error


def _measure(descriptor: int, requests: int, threads: int) -> dict[str, float]:
    first, second = range(requests), range(requests, 2 * requests)
    _rate([(os.pwritev, first), (os.pwritev, second)], descriptor, threads)  # real blocks for all
    return {
        "write": _rate([(os.pwritev, first)], descriptor, threads),
        "read": _rate([(os.preadv, first)], descriptor, threads),
        "both": _rate([(os.preadv, first), (os.pwritev, second)], descriptor, threads),
    }


def _rate(
    ways: list[tuple[Callable[[int, list[mmap.mmap], int], int], range]],
    descriptor: int,
    threads: int,
) -> float:
    """Bytes per second of these requests, all ways at once, each by threads of its own."""

    def serve(call: Callable[[int, list[mmap.mmap], int], int], numbers: range) -> None:
        with mmap.mmap(-1, REQUEST) as memory:
            memory.write(b"\1" * REQUEST)
            for number in numbers:
                call(descriptor, [memory], number * REQUEST)

    started = time.perf_counter()
    with ThreadPoolExecutor(len(ways) * threads) as pool:
        parts = [
            pool.submit(serve, call, numbers[i::threads])
            for call, numbers in ways
            for i in range(threads)
        ]
    for part in parts:
        part.result()
    return sum(len(numbers) for _, numbers in ways) * REQUEST / (time.perf_counter() - started)
