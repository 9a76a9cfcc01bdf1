"""The way into the command line, as ``slideformer`` and as ``python -m slideformer.tools``.

Loads nothing before Ctrl-C and SIGTERM are taken care of: the commands take a second to load, and
an interrupt meanwhile is to look like one later on.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

_INTERRUPTED = 130


def main() -> None:
    """Run the command of ``sys.argv``."""
    _leave_at_signals()
    from slideformer.tools.cli import app

    try:
        app()  # lets the signals raise KeyboardInterrupt once a command runs
    finally:
        _leave_at_signals()


def _leave_at_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave)


def _leave(number: int, frame: FrameType | None) -> None:
    os.write(2, b"error: interrupted\n")
    os._exit(_INTERRUPTED)


if __name__ == "__main__":
    main()
