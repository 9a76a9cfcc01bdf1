"""Ctrl-C and SIGTERM during a run: the first asks it to end, a second Ctrl-C ends it at once."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType
from typing import Any, Self

logger = logging.getLogger(__name__)


class Interrupt:
    """Inside a ``with`` block the first signal sets ``asked``; Ctrl-C again raises.

    ``asked`` is the signal's number or None; ``what`` says what follows the first one. Further
    SIGTERMs do nothing: whoever sends them waits for the end or kills. Python handles signals in
    its main thread only; in another one this does nothing.
    """

    def __init__(self, what: str) -> None:
        self.asked: int | None = None
        self.forced = False
        self._what = what
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked is None:
            self.asked = number
            # Not from here: this thread may be in the middle of writing to the same stream.
            threading.Thread(target=self._announce).start()
        elif number == signal.SIGINT:
            self.forced = True
            raise KeyboardInterrupt

    def _announce(self) -> None:
        name = "Ctrl-C" if self.asked == signal.SIGINT else "SIGTERM"
        logger.warning(
            "%s: finishing the steps in flight, then saving %s; another Ctrl-C leaves at once and "
            "saves nothing",
            name,
            self._what,
        )
