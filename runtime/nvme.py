"""The NVMe store: extents striped over preallocated files, moved by pools of I/O threads.

Requests of 4 MiB with direct I/O, several in flight each way, reach what the disk can do; the
threads spend their time in the kernel and in CRC-32, both without Python's lock. Reads and writes
have pools of their own, so that a long write does not hold a read up. Checksums are of the pieces
of an extent; an extent never written holds zeros and has none. GPU memory goes through KvikIO, in
the same threads and without checksums.
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import secrets
import socket
import threading
import time
import weakref
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import aiofiles

from slideformer.graph.errors import StoreError
from slideformer.memory.extents import Extent, Piece, file_nbytes, pieces
from slideformer.memory.gpu_io import GpuFiles
from slideformer.runtime.nvme_files import RunFile, check_distinct

logger = logging.getLogger(__name__)

THREADS = 4
"""I/O threads per folder and direction."""

SLOW = 100e6
"""Bytes/s below which a disk is reported as slow: a tenth of what a plain NVMe disk does."""

_SAMPLE = 64 << 20
"""Bytes that are moved before the rate is judged."""


class NvmeStore:
    """Keeps extents in one file per folder; make it with `open` or `open_store`, and `close` it."""

    def __init__(self, files: Sequence[RunFile], *, checksums: bool = True) -> None:
        self._files = files
        self._checksums: dict[str, list[int]] | None = {} if checksums else None
        self._read = _Direction("read", THREADS * len(files))
        self._write = _Direction("write", THREADS * len(files))
        self._gpu: GpuFiles | None = None
        self._lock = threading.Lock()
        # Also when nobody closes it; the files' own objects hold nothing of this one.
        self._remove = weakref.finalize(self, _close_all, files)

    @classmethod
    async def open(
        cls,
        folders: Sequence[Path],
        extents: Mapping[str, Extent],
        *,
        checksums: bool = True,
    ) -> Self:
        """Make the files for these extents in ``folders``; raises `StoreError`."""
        total = max((e.offset + e.nbytes for e in extents.values()), default=0)
        token = secrets.token_hex(4)
        check_distinct(folders)
        files: list[RunFile] = []
        try:
            for folder, nbytes in zip(folders, file_nbytes(total, len(folders)), strict=True):
                files.append(await asyncio.to_thread(RunFile, folder, nbytes, token))
            await _write_manifest(files, extents)
        except BaseException:
            _close_all(files)
            raise
        return cls(files, checksums=checksums)

    @property
    def direct(self) -> bool:
        """Whether all transfers bypass the page cache."""
        return all(file.direct for file in self._files)

    @property
    def paths(self) -> list[Path]:
        """The files."""
        return [file.path for file in self._files]

    def read(self, extent: Extent, into: Any) -> Future[None]:
        """Start filling ``into``, memory of the extent's size."""
        if hasattr(into, "__cuda_array_interface__"):
            return self._move_gpu(self._read, extent, into, self._gpu_files().read)
        view = _bytes(into, extent)
        known = self._checksums.get(extent.name) if self._checksums is not None else None

        def move(number: int, piece: Piece) -> int:
            part = view[piece.start : piece.stop]
            self._files[piece.file].read(part, piece.offset)
            if known is not None and zlib.crc32(part) != known[number]:
                raise OSError(errno.EIO, "the bytes are not those that were written (CRC-32)")
            return 0

        return self._move(self._read, extent, move, lambda _: None)

    def write(self, extent: Extent, source: Any) -> Future[None]:
        """Start writing an extent from memory, which must not change meanwhile."""
        if hasattr(source, "__cuda_array_interface__"):
            if self._checksums is not None:
                self._checksums.pop(extent.name, None)
            return self._move_gpu(self._write, extent, source, self._gpu_files().write)
        view = _bytes(source, extent)
        sums = self._checksums

        def move(number: int, piece: Piece) -> int:
            part = view[piece.start : piece.stop]
            self._files[piece.file].write(part, piece.offset)
            return 0 if sums is None else zlib.crc32(part)

        def remember(found: list[int]) -> None:
            if sums is not None:
                sums[extent.name] = found

        return self._move(self._write, extent, move, remember)

    def close(self) -> None:
        """Wait for what is under way and remove the files; a second time does nothing."""
        for direction in (self._read, self._write):
            direction.pool.shutdown()
        if self._gpu is not None:
            self._gpu.close()
            self._gpu = None
        self._remove()

    def _gpu_files(self) -> GpuFiles:
        with self._lock:
            if self._gpu is None:
                self._gpu = GpuFiles(self.paths)
                logger.info("GPU memory and NVMe exchange bytes by %s", self._gpu.mode)
            return self._gpu

    def _move_gpu(
        self,
        direction: _Direction,
        extent: Extent,
        memory: Any,
        call: Callable[[int, int, Any], int],
    ) -> Future[None]:
        assert len(memory) == extent.nbytes, f"{extent} does not fit {len(memory)} bytes of memory"

        def move(number: int, piece: Piece) -> int:
            self._files[piece.file].check()
            wanted = piece.stop - piece.start
            try:
                count = call(piece.file, piece.offset, memory[piece.start : piece.stop])
            except RuntimeError as error:  # KvikIO's own
                raise OSError(errno.EIO, str(error)) from error
            if count != wanted:
                raise OSError(errno.EIO, f"only {count:,} of {wanted:,} bytes were moved")
            return 0

        return self._move(direction, extent, move, lambda _: None)

    def _move(
        self,
        direction: _Direction,
        extent: Extent,
        move: Callable[[int, Piece], int],
        finish: Callable[[list[int]], None],
    ) -> Future[None]:
        def attempt(number: int, piece: Piece) -> int:
            try:
                return move(number, piece)
            except OSError as error:
                raise self._error(direction.verb, extent, piece, error) from error

        direction.begin()
        parts = [
            direction.pool.submit(attempt, number, piece)
            for number, piece in enumerate(pieces(extent, len(self._files)))
        ]

        def done(found: list[int]) -> None:
            finish(found)
            direction.end(extent.nbytes, self.paths)  # one that fails ends the run

        return _gather(parts, done)

    def _error(self, verb: str, extent: Extent, piece: Piece, error: OSError) -> StoreError:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full" if full else error.strerror or str(error)
        return StoreError(
            f"{self._files[piece.file].path}: cannot {verb} bytes {piece.start:,}–{piece.stop:,} "
            f"of extent {extent.name} at {piece.offset:,}: {reason}. State on NVMe is lost with "
            "the run; check the disk, or give another folder as --nvme, and resume from the last "
            "checkpoint or start again"
        )


def open_store(
    folders: Sequence[Path], extents: Mapping[str, Extent], *, checksums: bool = True
) -> NvmeStore:
    """`NvmeStore.open` for callers outside asyncio."""
    # In a thread of its own: the caller's may have a running loop, as in a notebook.
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(
            lambda: asyncio.run(NvmeStore.open(folders, extents, checksums=checksums))
        ).result()


class _Direction:
    """The threads of one way, and how fast they have been while a transfer was under way."""

    def __init__(self, verb: str, threads: int) -> None:
        self.verb = verb
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix=f"slideformer-nvme-{verb}")
        self._lock = threading.Lock()
        self._open = 0
        self._since = 0.0
        self._nbytes = 0
        self._seconds = 0.0
        self._reported = False

    def begin(self) -> None:
        """A transfer begins, beside others perhaps."""
        with self._lock:
            if self._open == 0:
                self._since = time.perf_counter()
            self._open += 1

    def end(self, nbytes: int, paths: Iterable[Path]) -> None:
        """A transfer is done; of a slow disk, say so once."""
        with self._lock:
            now = time.perf_counter()
            self._seconds += now - self._since
            self._open, self._since = self._open - 1, now
            self._nbytes += nbytes
            slow = self._nbytes >= _SAMPLE and self._nbytes < SLOW * self._seconds
            if not slow or self._reported:
                return
            self._reported = True
        logger.warning(
            "NVMe is slow: %ss of %.0f MB/s in %s; steps wait for it. Give a faster disk as "
            "--nvme, or more --cpu-memory",
            self.verb,
            self._nbytes / self._seconds / 1e6,
            ", ".join(str(path.parent) for path in paths),
        )


def _bytes(memory: Any, extent: Extent) -> memoryview:
    view = memoryview(memory).cast("B")
    assert len(view) == extent.nbytes, f"{extent} does not fit {len(view)} bytes of memory"
    return view


def _gather(parts: Sequence[Future[int]], done: Callable[[list[int]], None]) -> Future[None]:
    """A future that ends when all parts have ended, with the first error in their order."""
    whole: Future[None] = Future()
    lock = threading.Lock()
    left = len(parts)

    def ended(_: Future[int]) -> None:
        nonlocal left
        with lock:
            left -= 1
            if left:
                return
        errors = [error for part in parts if (error := part.exception()) is not None]
        if errors:
            whole.set_exception(errors[0])
        else:
            done([part.result() for part in parts])
            whole.set_result(None)

    for part in parts:
        part.add_done_callback(ended)
    return whole


def _close_all(files: Iterable[RunFile]) -> None:
    for file in files:
        file.close()


async def _write_manifest(files: Sequence[RunFile], extents: Mapping[str, Extent]) -> None:
    """Say beside the first file whose it is and what lies where, for people who wonder."""
    manifest = {
        "format": "slideformer-nvme",
        "version": 1,
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "files": [str(file.path) for file in files],
        "extents": {e.name: [e.offset, e.nbytes] for e in extents.values()},
    }

    def private(path: str, flags: int) -> int:
        return os.open(path, flags, 0o600)

    path = files[0].manifest
    try:
        async with aiofiles.open(path, "w", encoding="utf-8", opener=private) as file:
            await file.write(json.dumps(manifest, indent=1) + "\n")
    except OSError as error:
        raise StoreError(f"{path}: cannot be written: {error.strerror or error}") from error
