"""The private files of a run on NVMe: preallocated, locked while it lives, removed in the end.

A file is named after its process and locked (``flock``) as long as that has it open; the lock goes
with the process however that ends. Whoever makes a file in a folder first removes those that nobody
has locked, left by runs that were killed. Making and removing happen under a lock on the folder, so
that a file is never seen between its creation and its lock. A file is the last to go of what it has
beside it: who is killed while removing leaves something to be found by.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from slideformer.graph.buffers import PAGE
from slideformer.graph.errors import StoreError
from slideformer.runtime.direct_io import bypass_cache, move

logger = logging.getLogger(__name__)

_PATTERN = "slideformer-*.nvme"

_Transfer = Callable[[int, list[memoryview], int], int]
"""`os.preadv` or `os.pwritev`: file descriptor, memory and offset to the bytes moved."""


class RunFile:
    """``nbytes`` zeroed bytes in a new file of mode 0600 in ``folder``.

    ``direct`` tells whether it bypasses the page cache. Raises `StoreError` if the folder is
    missing, not writable or full; nothing is left behind then.
    """

    def __init__(self, folder: Path, nbytes: int, token: str) -> None:
        self.path = folder.absolute() / f"slideformer-{os.getpid()}-{token}.nvme"
        self.manifest = self.path.with_suffix(".json")
        with _usable(folder), _locked(folder):
            remove_stale(folder)
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self.descriptor = os.open(self.path, flags, 0o600)
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            with _usable(folder, nbytes):
                os.posix_fallocate(self.descriptor, 0, max(nbytes, PAGE))
                self.direct = bypass_cache(self.descriptor)
        except BaseException:
            self.close()
            raise
        if not self.direct:
            logger.warning(
                "%s: the file system has no direct I/O; transfers go through the page cache, "
                "slower and with memory beside the budget", folder,
            )  # fmt: skip

    def check(self) -> None:
        """Raise `FileNotFoundError` if the file's name is gone: whoever took it wants the disk."""
        if os.fstat(self.descriptor).st_nlink == 0:
            raise FileNotFoundError(errno.ENOENT, "the file, or its folder, has been removed")

    def read(self, into: memoryview, offset: int) -> None:
        """Fill ``into`` with the bytes at ``offset``; raises `OSError`."""
        self._move(os.preadv, into, offset, "are there; it was cut")

    def write(self, source: memoryview, offset: int) -> None:
        """Put bytes to ``offset``; raises `OSError`."""
        self._move(os.pwritev, source, offset, "are written")

    def close(self) -> None:
        """Remove the file and give its space back; a second time does nothing.

        Of a file that was moved, or whose folder has become read-only, only the space.
        """
        if self.descriptor < 0:
            return
        with suppress(OSError):
            self.manifest.unlink()
        try:
            self.path.unlink()
        except OSError as error:
            if os.fstat(self.descriptor).st_nlink:
                with suppress(OSError):
                    os.ftruncate(self.descriptor, 0)
                logger.warning(
                    "%s cannot be removed (%s); remove what is left", self.path, error.strerror
                )
        os.close(self.descriptor)
        self.descriptor = -1

    def _move(self, call: _Transfer, part: memoryview, offset: int, what: str) -> None:
        self.check()
        done = move(lambda left, at: call(self.descriptor, [left], at), part, offset)
        if done < len(part):
            raise OSError(errno.EIO, f"only {done:,} of {len(part):,} bytes {what}")


def check_distinct(folders: Sequence[Path]) -> None:
    """Raise `StoreError` for a folder that is named twice, by whatever path."""
    known: set[Path] = set()
    for folder in folders:
        if folder.resolve() in known:
            raise StoreError(f"NVMe folder {folder} is given twice; give each --nvme once")
        known.add(folder.resolve())


def stale_nbytes(folder: Path) -> int:
    """Bytes on the disk that the next `RunFile` in ``folder`` gives back.

    Raises `OSError` if the folder cannot be read.
    """
    with _locked(folder):
        return sum(512 * path.stat().st_blocks for path in _stale(folder))


def remove_stale(folder: Path) -> None:
    """Remove the files of runs that have ended without doing so; the caller locks the folder."""
    for path in _stale(folder):
        path.with_suffix(".json").unlink(missing_ok=True)
        path.unlink()
        logger.info("removed %s, left by a run that was killed", path)


def _stale(folder: Path) -> Iterator[Path]:
    """The files that nobody has locked; locked themselves until the next is asked for."""
    for path in folder.glob(_PATTERN):
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:  # another user's, or gone
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield path
        except BlockingIOError:  # its run is alive
            continue
        finally:
            os.close(descriptor)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _usable(folder: Path, nbytes: int = 0) -> Iterator[None]:
    """Turn what the system refuses into a `StoreError` that says what to try."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise StoreError(
                f"NVMe folder {folder} takes no file of {_mib(nbytes)}, which the run needs there: "
                "its file system or `ulimit -f` allows less; raise that, or give several folders "
                "as --nvme"
            ) from error
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(folder).free
            raise StoreError(
                f"no room in NVMe folder {folder}: the run needs {_mib(nbytes)} there, free are "
                f"{_mib(free)}; free some, lower --nvme-memory or give another folder as --nvme"
            ) from error
        raise StoreError(
            f"NVMe folder {folder} cannot be used ({error.strerror or error}); give a folder that "
            "exists and that you may write to as --nvme"
        ) from error


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:,.1f} MiB"
