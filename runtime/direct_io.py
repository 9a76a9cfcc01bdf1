"""Direct I/O: transfers between memory and disk that leave the page cache out.

Offsets, sizes and memory are then multiples of a `PAGE`.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np

from slideformer.graph.buffers import PAGE

_libc = ctypes.CDLL(None, use_errno=True)


def take_room(descriptor: int, nbytes: int) -> None:
    """Let a file have room for ``nbytes``, where the file system can set that aside.

    Unlike `os.posix_fallocate` it does not write to every block where it cannot. Raises `OSError`
    if the room is not there.
    """
    while _libc.fallocate(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(nbytes)):
        error = ctypes.get_errno()
        if error in (errno.EOPNOTSUPP, errno.ENOSYS):
            return
        if error != errno.EINTR:
            raise OSError(error, os.strerror(error))


def bypass_cache(descriptor: int) -> bool:
    """Turn direct I/O on for a file open for reading and writing; whether it works.

    It is tried, since some file systems refuse it only when it is used. Raises `OSError` for any
    other failure.
    """
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
        with mmap.mmap(-1, PAGE) as page:
            os.preadv(descriptor, [page], 0)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)
        return False
    return True


def move(call: Callable[[memoryview, int], int], part: memoryview, offset: int) -> int:
    """Repeat a system call, which may move less than it is asked for, until all is moved.

    ``call`` is given what is left and its offset. Returns how many bytes it moved: fewer than all
    if the last call moved none.
    """
    done = 0
    while done < len(part) and (count := call(part[done:], offset + done)):
        done += count
    return done


class NewFile:
    """A new file that is filled in any order and from any thread, past the page cache.

    Its room of ``nbytes`` is taken at once, where that can be. Raises `OSError`, as its methods do.
    """

    def __init__(self, path: Path, nbytes: int) -> None:
        flags = os.O_RDWR | os.O_CLOEXEC
        self._cached = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o666)
        self._direct = -1
        try:
            if nbytes:
                take_room(self._cached, nbytes)
            if nbytes >= PAGE:
                self._direct = os.open(path, flags)
                if not bypass_cache(self._direct):
                    os.close(self._direct)
                    self._direct = -1
        except BaseException:
            self.close()
            raise

    @property
    def direct(self) -> bool:
        """Whether it bypasses the page cache, as far as the file system can."""
        return self._direct >= 0

    def write(self, part: memoryview, start: int) -> None:
        """Put bytes to ``start``: through the cache only those that share a page with others."""
        first = min(-start % PAGE, len(part))
        last = len(part) - (len(part) - first) % PAGE
        _write(self._cached, part[:first], start)
        if self.direct and first < last:
            first += _try(self._direct, _bounce.on_pages(part[first:last]), start + first)
        _write(self._cached, part[first:], start + first)

    def flush(self) -> None:
        """Bring it to the disk and close it; a second time does nothing."""
        if self._cached >= 0:
            os.fsync(self._cached)
            # What is on the disk need not stay in memory, where it would count as the system's.
            os.posix_fadvise(self._cached, 0, 0, os.POSIX_FADV_DONTNEED)
            self.close()

    def close(self) -> None:
        """Close it; a second time does nothing."""
        descriptors = self._cached, self._direct
        self._cached = self._direct = -1
        for descriptor in descriptors:
            if descriptor >= 0:
                with suppress(OSError):  # it is closed all the same, and what counts was flushed
                    os.close(descriptor)


class _Bounce(threading.local):
    """Memory on pages, of each thread its own."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, PAGE)

    def on_pages(self, part: memoryview) -> memoryview:
        """The same bytes where a page begins."""
        source = np.frombuffer(part, np.uint8)
        if source.ctypes.data % PAGE == 0:
            return part
        if len(self._memory) < len(part):
            self._memory = mmap.mmap(-1, len(part))
        target = memoryview(self._memory)[: len(part)]
        np.copyto(np.frombuffer(target, np.uint8), source)  # unlike a slice, it gives up the GIL
        return target


_bounce = _Bounce()


def _try(descriptor: int, pages: memoryview, offset: int) -> int:
    """Write past the page cache; how many bytes of it went.

    What is left may begin on no page, or nothing went since the disk's blocks are larger than a
    page, which reading from a new file does not tell: it is left to the cache.
    """
    try:
        return os.pwrite(descriptor, pages, offset)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return 0


def _write(descriptor: int, part: memoryview, offset: int) -> None:
    if move(partial(os.pwrite, descriptor), part, offset) < len(part):
        raise OSError(errno.EIO, "nothing more could be written")
