"""Direct I/O: transfers between memory and disk that leave the page cache out.

Offsets, sizes and memory are then multiples of a `PAGE`.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os

from slideformer.graph.buffers import PAGE


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
