"""Paths that no file can have."""

from __future__ import annotations

import os
from pathlib import Path

_LONGEST_NAME = 255
"""Bytes of a file's name that Linux takes."""


def path_problem(path: Path) -> str:
    """Why no file can have that path, or nothing; the system raises when asked about such a one."""
    if "\0" in str(path):
        return "it has a null character"
    if any(len(os.fsencode(part)) > _LONGEST_NAME for part in path.parts):
        return f"a name in it is longer than {_LONGEST_NAME} bytes"
    return ""
