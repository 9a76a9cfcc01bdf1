"""Checkpoints of named byte ranges: a folder of files, and a manifest of what is in each.

Files are filled by positioned writes, in any order and from any thread, in pieces that several I/O
threads move at once, past the page cache where the file system can do that. Each piece has a
CRC-32, and the manifest, which is written last, has the digest of itself: a folder with a manifest
is complete, and what is read from it is what was written. What the ranges mean is the caller's
matter, and so is where the folder lies.

    with RangeWriter(folder, {"units/L00": 1200}) as writer:
        writer.write("units/L00", {0: memory})
        writer.finish({"step": 10})

    reader = RangeReader(folder)
    reader.read("units/L00", 200, into)
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from slideformer.graph.errors import CheckpointError
from slideformer.runtime.direct_io import NewFile, move

MANIFEST = "manifest.json"
"""Name of the manifest in the folder of a checkpoint."""

VERSION = 1

PIECE = 4 << 20
"""Most bytes that are moved, and have a checksum, together."""

THREADS = 16
"""I/O threads of a checkpoint that is written or read: some move bytes while others sum them up."""

_Count = Annotated[int, Field(ge=0)]
_Piece = tuple[_Count, _Count, _Count]
"""Offset and number of bytes, and their CRC-32."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _File(_Strict):
    nbytes: _Count
    pieces: list[_Piece]


class _Manifest(_Strict):
    format: Literal["slideformer-checkpoint"]
    version: int
    files: dict[str, _File]
    info: dict[str, Any]
    digest: str


class RangeWriter:
    """Writes files of known sizes into ``folder``, which exists; a context manager.

    Their room on the disk is taken at once, where that can be. Raises `OSError`, as all its methods
    do, for whatever the file system refuses.
    """

    def __init__(self, folder: Path, files: Mapping[str, int]) -> None:
        self._folder = folder
        self._files: dict[str, _Filling] = {}
        self._flushes: list[Future[None]] = []
        self._lock = threading.Lock()
        self._pool = _started_pool()
        try:
            for name, nbytes in files.items():
                self._open(name, nbytes)
        except BaseException:
            self.close()
            raise

    def write(self, name: str, ranges: Mapping[int, Any]) -> None:
        """Write memory at the offsets in a file that it is keyed by; each byte of a file once.

        Returns when the system has all of it.
        """
        file = self._files[name]
        parts = [
            self._pool.submit(file.put, start, part)
            for offset, memory in ranges.items()
            for start, part in _pieces(offset, memoryview(memory).cast("B"))
        ]
        errors = [error for part in parts if (error := part.exception()) is not None]
        if errors:
            raise errors[0]
        with self._lock:
            file.pieces += [part.result() for part in parts]
            if parts and not file.left and not file.disk.direct:  # all of it is in memory now
                self._flushes.append(self._pool.submit(file.disk.flush))

    def add(self, name: str, content: bytes) -> None:
        """Add a whole file."""
        self._open(name, len(content))
        self.write(name, {0: content})

    def finish(self, info: Mapping[str, Any]) -> None:
        """Wait until all is on the disk, and write the manifest with ``info``, values of JSON."""
        left = {name: file.left for name, file in self._files.items() if file.left}
        assert not left, f"not written: {left}"
        for flush in self._flushes:
            flush.result()
        # All others only now: a disk writes nothing while it flushes.
        for flush in [self._pool.submit(file.disk.flush) for file in self._files.values()]:
            flush.result()
        for name in self._files:  # one that was removed meanwhile has been written all the same
            (self._folder / name).stat()
        content: dict[str, Any] = {
            "format": "slideformer-checkpoint",
            "version": VERSION,
            "files": {
                name: {"nbytes": file.nbytes, "pieces": sorted(file.pieces)}
                for name, file in self._files.items()
            },
            "info": dict(info),
        }
        with (self._folder / MANIFEST).open("x", encoding="utf-8") as manifest:
            manifest.write(json.dumps({**content, "digest": _digest(content)}) + "\n")
            manifest.flush()
            os.fsync(manifest.fileno())

    def close(self) -> None:
        """End the threads and close the files; a second time does nothing."""
        self._pool.shutdown()
        for file in self._files.values():
            file.disk.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, name: str, nbytes: int) -> None:
        # Not the folder itself: one that was removed is not to come back without what it held.
        for parent in reversed(Path(name).parents[:-1]):
            (self._folder / parent).mkdir(exist_ok=True)
        self._files[name] = _Filling(NewFile(self._folder / name, nbytes), nbytes)


def _started_pool() -> ThreadPoolExecutor:
    """I/O threads that all run: one that could not be started later would fail the run.

    Raises `OSError` if there can be no more threads.
    """
    pool = ThreadPoolExecutor(THREADS, thread_name_prefix="slideformer-checkpoint")
    started = threading.Barrier(THREADS)
    try:
        for _ in range(THREADS):
            pool.submit(started.wait)
    except RuntimeError as error:
        started.abort()
        pool.shutdown()
        raise OSError(errno.EAGAIN, str(error)) from error
    return pool


@dataclass
class _Filling:
    """A new file of ``nbytes``, and the pieces that it has."""

    disk: NewFile
    nbytes: int
    pieces: list[_Piece] = field(default_factory=list)

    @property
    def left(self) -> int:
        """Bytes that are not written yet."""
        return self.nbytes - sum(nbytes for _, nbytes, _ in self.pieces)

    def put(self, start: int, part: memoryview) -> _Piece:
        """Write a piece."""
        self.disk.write(part, start)
        return start, len(part), zlib.crc32(part)


def _pieces(offset: int, memory: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Cut memory that goes to ``offset`` of a file where multiples of `PIECE` are in the file."""
    begin = 0
    while begin < len(memory):
        end = min(begin + PIECE - (offset + begin) % PIECE, len(memory))
        yield offset + begin, memory[begin:end]
        begin = end


class RangeReader:
    """Reads a folder that a `RangeWriter` finished; ``info`` is what it was given.

    Raises `CheckpointError`, which names the file, if the folder is none, incomplete or altered.
    All sizes are checked here, contents as they are read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        manifest = _read_manifest(folder / MANIFEST)
        self._files = manifest.files
        self.info = manifest.info
        for name, file in self._files.items():
            self._check_size(name, file.nbytes)

    @property
    def files(self) -> Mapping[str, int]:
        """Bytes of each file."""
        return {name: file.nbytes for name, file in self._files.items()}

    def read(self, name: str, offset: int, into: Any) -> None:
        """Fill ``into`` with the bytes from ``offset`` on.

        Raises `CheckpointError` if they are not those that were written.
        """
        view = memoryview(into).cast("B")
        stop = offset + len(view)
        path = self.folder / name
        wanted = [p for p in self._files[name].pieces if p[0] < stop and offset < p[0] + p[1]]
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise _unreadable(path, error) from error

        def move(piece: _Piece) -> None:
            start, nbytes, crc = piece
            whole = offset <= start and start + nbytes <= stop
            part = view[start - offset : start - offset + nbytes] if whole else bytearray(nbytes)
            _read_piece(path, descriptor, start, memoryview(part))
            if zlib.crc32(part) != crc:
                raise CheckpointError(
                    f"{path}: bytes {start:,}–{start + nbytes:,} are not those that were written "
                    "(CRC-32): the file was altered or the disk fails; use another checkpoint"
                )
            if not whole:
                first, last = max(start, offset), min(start + nbytes, stop)
                view[first - offset : last - offset] = part[first - start : last - start]

        try:
            with ThreadPoolExecutor(THREADS, thread_name_prefix="slideformer-checkpoint") as pool:
                for each in [pool.submit(move, piece) for piece in wanted]:
                    each.result()
        finally:
            os.close(descriptor)

    def content(self, name: str) -> bytes:
        """All bytes of a file; raises `CheckpointError`."""
        into = bytearray(self._files[name].nbytes)
        self.read(name, 0, into)
        return bytes(into)

    def _check_size(self, name: str, nbytes: int) -> None:
        path = self.folder / name
        try:
            found = path.stat().st_size
        except OSError as error:
            raise _unreadable(path, error) from error
        if found != nbytes:
            what = "is cut short" if found < nbytes else "was altered"
            raise CheckpointError(
                f"{path} {what}: it has {found:,} bytes, {nbytes:,} were written; use another "
                "checkpoint"
            )


def _read_manifest(path: Path) -> _Manifest:
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent} is not a checkpoint to resume from: it has no {path.name}"
        ) from None
    except OSError as error:
        raise _unreadable(path, error) from error
    try:
        content = json.loads(text)
        found = content.pop("digest")
        version = content["version"]
        if content["format"] != "slideformer-checkpoint":
            raise ValueError("it is of another format")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(path, error) from None
    if version != VERSION:
        raise CheckpointError(
            f"{path} is of version {version!r}, this program reads {VERSION}; use the release that "
            "wrote it"
        )
    if found != _digest(content):
        raise _damaged(path, "its digest does not fit")
    try:
        return _Manifest.model_validate({**content, "digest": found})
    except ValidationError as error:  # only a digest made by someone else can lead here
        raise _damaged(path, error.errors()[0]["msg"]) from None


def _damaged(path: Path, reason: object) -> CheckpointError:
    return CheckpointError(f"{path} is damaged or was altered ({reason}); use another checkpoint")


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path} cannot be read: {error.strerror or error}")


def _read_piece(path: Path, descriptor: int, start: int, part: memoryview) -> None:
    try:
        done = move(lambda left, at: os.preadv(descriptor, [left], at), part, start)
    except OSError as error:
        raise _unreadable(path, error) from error
    if done < len(part):
        raise CheckpointError(f"{path} is cut short; use another checkpoint")


def _digest(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
