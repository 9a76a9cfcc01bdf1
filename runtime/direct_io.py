"""Direct I/O: transfers between memory and disk that leave the page cache out.

Offsets, sizes and memory are then multiples of a `PAGE`.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os

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
