"""The way into the command line, as ``slideformer`` and as ``python -m slideformer.tools``.

Loads nothing before Ctrl-C is taken care of: the commands take a second to load, and an interrupt
meanwhile is to look like one later on.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

_INTERRUPTED = 130


def main() -> None:
    """Run the command of ``sys.argv``."""
    signal.signal(signal.SIGINT, _leave)
    from slideformer.tools.cli import app

    try:
        app()  # gives Ctrl-C back to Python once a command runs
    finally:
        signal.signal(signal.SIGINT, _leave)


def _leave(number: int, frame: FrameType | None) -> None:
    os.write(2, b"error: interrupted\n")
    os._exit(_INTERRUPTED)


if __name__ == "__main__":
    main()
