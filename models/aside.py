"""Folders that appear whole or not at all: written aside, made durable, then renamed.

A folder aside is hidden beside its target, ``.NAME.tmp-PID``, and locked by its owner (``flock``)
for as long as the owner lives. One without a living owner was left by a process that was killed;
whoever writes to the same target next removes it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import itertools
import logging
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

from slideformer.graph.errors import CheckpointError
from slideformer.models.paths import path_problem

logger = logging.getLogger(__name__)

_HEADROOM = 64 * 2**20
"""Bytes left free beside a folder: for its small files and the file system's own records."""


def check_output(output: Path, *, replace: bool = False) -> None:
    """Check that a folder could be saved as ``output``, without leaving anything behind.

    ``replace``: a folder that is there need not be empty, as it is to be replaced.

    Raises:
        CheckpointError: ``output`` is there and not such a folder, or it could not be created.
    """
    output = output.absolute()
    if problem := path_problem(output) or (not output.name and "it has no name"):
        raise CheckpointError(f"output {str(output)!r:.60}: {problem}; give another path")
    if output.is_dir():
        if any(output.iterdir()) and not replace:
            raise CheckpointError(
                f"output folder {output} is not empty: give another one, or empty it first"
            )
        if output.is_mount():
            raise CheckpointError(
                f"output folder {output} is a mount point and cannot be replaced: give a folder"
                f" within it, such as {output / 'model'}"
            )
    elif output.exists() or output.is_symlink():
        raise CheckpointError(f"output {output} is not a folder: give another path")
    parent = existing_parent(output)
    # Named as a folder aside: what a kill between the two calls leaves, the next run removes.
    probe = parent / f".{output.name}.tmp-{os.getpid()}.probe"
    try:
        probe.mkdir(exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            probe.rmdir()
    except OSError as error:
        raise CheckpointError(
            f"output folder {output} cannot be created in {parent} ({error.strerror or error}):"
            " give a path that you may write to"
        ) from error


def check_room(output: Path, nbytes: int, what: str = "", *, spare: bool = True) -> None:
    """Raise `CheckpointError` unless the disk of ``output`` has room for that and some to spare.

    ``what`` it is for is the checkpoint ``output`` if not said.
    """
    beside = _HEADROOM if spare else 0
    if nbytes + beside > shutil.disk_usage(existing_parent(output)).free:
        raise no_room(output, nbytes, what, beside)


def no_room(output: Path, nbytes: int, what: str = "", beside: int = 0) -> CheckpointError:
    """The error for so many bytes, and some ``beside`` them, that do not fit on a disk."""
    free = shutil.disk_usage(existing_parent(output)).free
    needed, spare, left = (f"{size / 2**20:,.1f} MiB" for size in (nbytes, beside, free))
    return CheckpointError(
        f"no room for {what or f'checkpoint {output}'}: it needs {needed}"
        f"{f' and {spare} to spare' if beside else ''}, free are {left}; free some or give a folder"
        " on another disk"
    )


def write_error(output: Path, nbytes: int, error: OSError) -> CheckpointError:
    """The error for a folder of so many bytes that the file system refused with ``error``."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return no_room(output, nbytes)
    return CheckpointError(f"cannot write checkpoint {output}: {error}")


def free_name(output: Path) -> Path:
    """``output``, or if a folder cannot be put there the first of ``output-1``, … that is free.

    Raises:
        CheckpointError: nothing can be created beside it.
    """
    number, candidate = 0, output
    while True:
        try:
            check_output(candidate)
        except CheckpointError:
            if not os.path.lexists(candidate):
                raise
            number += 1
            candidate = output.with_name(f"{output.name}-{number}")
        else:
            return candidate


class AsideFolder:
    """A new, empty, locked folder ``path`` beside ``output``, until `move` or `abort`."""

    def __init__(self, output: Path) -> None:
        """Raises `OSError` if it cannot be made."""
        self.output = output.absolute()
        remove_orphans(self.output)
        self._over = threading.Lock()  # taken by whoever moves or removes it, and kept
        self.output.parent.mkdir(parents=True, exist_ok=True)
        name = f".{self.output.name}.tmp-{os.getpid()}"
        for number in itertools.count():
            self.path = self.output.parent / (f"{name}-{number}" if number else name)
            with contextlib.suppress(FileExistsError):  # this process's own, for another thread
                self.path.mkdir()
                self._lock = _lock_new(self.path)
                if self._lock >= 0:
                    break

    def move(self, *, replace: bool = False) -> Path:
        """Make the contents durable and put the folder in its place; returns where it lies.

        With ``replace`` a folder that lies there goes first. Otherwise, if something took that
        place meanwhile, it goes beside it under a free name, and a warning says so: what took hours
        is not thrown away. The files must have been fsynced.

        Raises:
            FileNotFoundError: it was aborted meanwhile; what lies in its place stays.
            OSError: nothing can be renamed here; the folder stays aside then, with its contents.
        """
        for folder in (*(p for p in self.path.rglob("*") if p.is_dir()), self.path):
            fsync(folder)
        if not self._over.acquire(blocking=False):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.path))
        target = self.output
        if replace and target.is_dir():
            discard(target)
        while True:
            try:
                os.rename(self.path, target)
            except OSError:
                following = free_name(target)
                if following == target:
                    raise
                target = following
            else:
                break
        if target != self.output:
            logger.warning("%s is taken by now; what was to be saved there is %s", self.output,
                           target)  # fmt: skip
        fsync(target.parent)
        os.close(self._lock)
        return target

    def abort(self) -> None:
        """Remove it, unless it was moved."""
        if self._over.acquire(blocking=False):
            _remove(self.path, self.path.with_name(f"{self.path.name}.removed"))
            os.close(self._lock)


def discard(folder: Path) -> None:
    """Remove a folder so that it is whole or gone for whoever looks, whenever this is killed."""
    _remove(folder, folder.with_name(f".{folder.name}.tmp-{os.getpid()}.removed"))


def _remove(path: Path, doomed: Path) -> None:
    # Moved first: a thread that still writes can then add no file while this removes them.
    with contextlib.suppress(OSError):
        os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)
    shutil.rmtree(path, ignore_errors=True)


def remove_orphans(output: Path) -> None:
    """Remove the folders aside of ``output`` whose owners were killed; of ``*`` all beside it."""
    for path in _asides(output.absolute()):
        try:
            lock = _lock(path)
        except OSError:  # no locks on this file system, or no access: not ours to remove
            continue
        if lock >= 0:
            logger.info("removing %s, left by a run that was killed", path)
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)


def _asides(output: Path) -> Iterator[Path]:
    name = "*" if output.name == "*" else glob.escape(output.name)
    yield from [path for path in output.parent.glob(f".{name}.tmp-*") if path.is_dir()]


def _lock(path: Path) -> int:
    """A descriptor that holds the lock of a folder, or -1 if another has it or the folder is gone.

    The lock is released when the descriptor is closed, at the latest by the end of the process.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return -1
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Between opening and locking it may have been removed, and made anew.
        if os.path.samestat(os.fstat(descriptor), path.stat()):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return -1


def _lock_new(path: Path) -> int:
    """`_lock` of a folder just made, without the lock where the file system has none."""
    try:
        return _lock(path)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def existing_parent(path: Path) -> Path:
    """The nearest folder above ``path`` that exists; of a file in the way, the file."""
    return next(parent for parent in path.absolute().parents if parent.exists())


def fsync(path: Path) -> None:
    """Make a file or folder durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
