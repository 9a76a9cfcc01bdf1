"""One run at a time into an output: a lock beside it, which goes with the process that holds it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from slideformer.graph.errors import CheckpointError


@contextlib.contextmanager
def only_run(output: Path) -> Iterator[None]:
    """Be the only run that saves to ``output``, and has its checkpoints, until this is left.

    The file ``.NAME.lock`` beside it is locked (``flock``) and names the process. It is removed in
    the end; one that a killed run left is free. Raises `CheckpointError` if another run has it.
    """
    output = output.absolute()
    made = [parent for parent in output.parents if not parent.exists()]
    path = _lock_file(output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        lock = _locked(path)
        if lock is None:
            raise CheckpointError(
                f"another run{_process(path)} is saving to {output}: wait for its end, or give "
                "another output"
            )
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be written ({error.strerror or error}), which keeps other runs from "
            f"{output}: give an output where you may write"
        ) from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # before the lock goes, so that it is no other run's
        os.close(lock)
        for parent in made:  # those that stayed empty
            with contextlib.suppress(OSError):
                parent.rmdir()


def remove_lock(output: Path) -> None:
    """Remove the lock file of a run that was killed when it had saved all, if there is one."""
    # An output that could be no run's has none.
    with contextlib.suppress(CheckpointError, OSError, ValueError):
        if _lock_file(output.absolute()).exists():
            with only_run(output):
                pass


def _lock_file(output: Path) -> Path:
    return output.with_name(f".{output.name}.lock")


def _locked(path: Path) -> int | None:
    """A descriptor that holds the lock of a file, which is made if need be; None if another has it.

    Raises `OSError` if it cannot be made.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                return None
            except OSError as error:
                # Without locks there is nothing to hold, as with folders aside.
                if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
                    raise
            # Between opening and locking, the run that had it may have removed it.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    os.ftruncate(descriptor, 0)
                    os.write(descriptor, str(os.getpid()).encode())
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _process(path: Path) -> str:
    """Which process says in ``path`` that it has the lock, in words, if it has said so by now."""
    try:
        pid = path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""
    return f", process {pid}," if pid else ""
