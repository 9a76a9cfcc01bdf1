"""Files that are there whole or not at all."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file, text in UTF-8, at once in place of one that is there.

    Where a link leads is written, and into a device or pipe, which nothing may replace. Raises
    `OSError` if it cannot be written; nothing is left behind then.
    """
    if path.is_dir():  # which may have no name, as `/` and `.`
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    data = content.encode() if isinstance(content, str) else content
    if path.exists() and not path.is_file():
        path.write_bytes(data)
        return
    target = Path(os.path.realpath(path))
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        aside.write_bytes(data)
        aside.replace(target)
    finally:
        with suppress(OSError):
            aside.unlink()
