"""How the command line speaks: logs and errors on stderr, exit codes, no traceback unless asked.

Data goes to stdout and is written by the commands themselves.
"""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.logging import RichHandler

from slideformer.graph.errors import ConfigError, SlideFormerError

INTERRUPTED = 130
"""Exit code after Ctrl-C and SIGTERM."""


def plain_console(**settings: Any) -> Console:
    """A console that prints names of files and graphs as they are, whatever brackets they have."""
    return Console(highlight=False, markup=False, emoji=False, **settings)


def stderr_console() -> Console:
    """A console on what is stderr now."""
    return plain_console(stderr=True)


def set_up_logging(console: Console, *, debug: bool = False) -> None:
    """Send this package's log to the console: above a progress bar, or as plain lines to a file.

    What the terminal's encoding lacks, and bytes of file names that are no text, are escaped.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    package = logging.getLogger("slideformer")
    for handler in package.handlers[:]:
        package.removeHandler(handler)
    if console.is_terminal:
        package.addHandler(
            RichHandler(console=console, show_time=False, show_path=False, show_level=False)
        )
    else:
        package.addHandler(logging.StreamHandler(console.file))
    package.handlers[0].setFormatter(_Formatter())
    package.setLevel(logging.DEBUG if debug else logging.INFO)


class _Formatter(logging.Formatter):
    """The message alone, behind its level where that is a warning or worse."""

    def format(self, record: logging.LogRecord) -> str:
        message = super().format(record)
        if record.levelno < logging.WARNING:
            return message
        return f"{record.levelname.lower()}: {message}"


@contextmanager
def reporting_errors(*, debug: bool = False) -> Iterator[None]:
    """Turn whatever goes wrong into one clear message and an exit code, or a traceback in debug.

    A user's error leaves with code 1, one ``error: …`` line each; so does an error of ours. Ctrl-C
    and SIGTERM leave with 130 and at once: what is half written is removed, but threads in the
    middle of something are not waited for. Errors of the command line's own parser pass.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    except SlideFormerError as error:
        if debug:
            traceback.print_exc()
        for line in _lines(error):
            print(f"error: {line}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        if debug:
            traceback.print_exc()
        print("error: interrupted", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(INTERRUPTED)
    except BrokenPipeError:  # whoever read our output has left
        raise
    except OSError as error:  # of a path that the user gave, or of the machine
        if debug:
            traceback.print_exc()
        where = "" if error.filename is None else f"{str(error.filename)!r:.100}: "
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
        raise SystemExit(1) from None
    except Exception as error:
        if isinstance(error, typer.Abort) or hasattr(error, "exit_code"):
            raise  # the parser's own, which carry their exit code
        if debug:
            traceback.print_exc()
        reason = " ".join(str(error).split())
        print(
            f"error: unexpected {type(error).__name__}: {reason} (this is a bug; "
            "`slideformer --debug …` shows where it happened)",
            file=sys.stderr,
        )
        raise SystemExit(1) from None


def _lines(error: SlideFormerError) -> list[str]:
    """One line, or for settings one per problem."""
    if isinstance(error, ConfigError):
        return str(error).splitlines()
    return [" ".join(str(error).split())]


def run_alone(command: Callable[..., None], arguments: Any = None) -> None:
    """Run one command without the rest of the command line; its log goes to stderr."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    app = typer.Typer(add_completion=False)
    app.command()(command)
    try:
        app(arguments)
    except SlideFormerError as error:
        sys.exit(f"error: {error}")
