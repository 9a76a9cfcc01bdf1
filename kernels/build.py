"""Compile a C++ source on first use into a private per-user cache, and load it.

A library is keyed by source, command, compiler version and CPU features, so one home directory can
serve different machines. It is compiled under another name and renamed, so any number of processes
may come at once. Where the cache cannot be used, a temporary folder serves this process alone. What
to do without a compiler is the caller's decision.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_logger = logging.getLogger(__name__)

_OPTIONS = [
    "-std=c++17",
    "-O3",
    "-march=native",
    "-fopenmp",
    "-fno-fast-math",  # some compilers start out with it; results must be correctly rounded
    "-fno-math-errno",  # lets sqrt be one vector instruction
    "-ffp-contract=off",  # every fused operation is written as one
    "-fPIC",
    "-shared",
]
if platform.machine() == "x86_64":
    _OPTIONS.append("-mprefer-vector-width=512")

_ERROR_LINES = 8


class BuildError(Exception):
    """A library could not be compiled or loaded; the message carries the compiler's last lines."""


@dataclass(frozen=True, slots=True)
class Build:
    """A loaded library and a line that says what it was made of."""

    library: ctypes.CDLL
    identifier: str


def find_compiler() -> str | None:
    """A C++ compiler's command: ``$CXX`` if set, else the first of g++, c++, clang++ there is."""
    if command := os.environ.get("CXX", "").strip():
        return command
    return next((name for name in ("g++", "c++", "clang++") if shutil.which(name)), None)


def load_library(source: Path, compiler: str) -> Build:
    """Load the library made from one C++ source, compiling it if the cache does not hold it.

    Args:
        source: The C++ file.
        compiler: Command of a compiler with the options of GCC, as ``$CXX`` holds it.

    Raises:
        BuildError: The compiler cannot be run or refuses the source, or the result does not load.
    """
    command = shlex.split(compiler)
    version = _run([*command, "--version"]).partition("\n")[0].strip()
    text = source.read_bytes()
    cpu = _cpu_features()
    key = [*command, *_OPTIONS, version, cpu]
    digest = _digest(text, *(part.encode() for part in key))
    identifier = f"{source.name} {_digest(text)[:12]}, CPU {_digest(cpu.encode())[:12]}, {version}"
    name = f"{source.stem}-{digest[:32]}.so"
    try:
        return Build(_load(cache_folder(), name, source, command), identifier)
    except OSError as error:
        _logger.warning(
            "The kernel cache is not usable (%s): compiling %s for this process alone. "
            "Set XDG_CACHE_HOME to a folder of yours to compile it once.",
            error,
            source.name,
        )
    with tempfile.TemporaryDirectory(prefix="slideformer-") as folder:
        try:  # a loaded library outlives its file
            return Build(_load(Path(folder), name, source, command), identifier)
        except OSError as error:
            raise BuildError(f"cannot build or load {source.name} in {folder}: {error}") from error


def _load(folder: Path, name: str, source: Path, command: list[str]) -> ctypes.CDLL:
    """The library of that name in ``folder``, compiled if absent. OSError: the folder is no use."""
    path = folder / name
    if not path.exists():
        with aside(path) as temporary:
            _run([*command, *_OPTIONS, str(source), "-o", str(temporary)])
    return ctypes.CDLL(str(path))


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """A new file beside ``path`` that takes its place if the block succeeds.

    Raises OSError if it cannot be made there.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def cache_folder() -> Path:
    """The per-user cache folder, made with mode 0700. OSError: it cannot be made or trusted."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        parent = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    except RuntimeError as error:  # no home directory is known
        raise OSError(str(error)) from error
    folder = parent / "slideformer"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        # Whoever can write here can run code as this user.
        raise PermissionError(f"{folder} belongs to or can be written by somebody else")
    return folder


def _run(command: list[str]) -> str:
    """Standard output of a compiler's run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise BuildError(f"cannot run {command[0]}: {error.strerror}") from error
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()[-_ERROR_LINES:]
        raise BuildError(
            f"{command[0]} failed with exit status {done.returncode}:\n" + "\n".join(lines)
        )
    return done.stdout


def _cpu_features() -> str:
    """The features that ``-march=native`` looks at, as Linux lists them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return f"{platform.machine()} {' '.join(sorted(value.split()))}"
    return f"{platform.machine()} {platform.processor()}"


def _digest(*parts: bytes) -> str:
    """SHA-256 of byte strings, each counted with its length."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()
