"""Libraries are compiled once, safely, into a private cache; what fails says why."""

from __future__ import annotations

import ctypes
import logging
import platform
import re
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from slideformer.kernels import adamw_library, build
from slideformer.kernels.adamw_library import load_kernels
from slideformer.kernels.build import BuildError, find_compiler, load_library

ROOT = Path(__file__).parents[2]
KERNEL = ROOT / "kernels" / "adamw.cpp"

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "slideformer"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "answer.cpp"
    path.write_text('extern "C" int answer() { return 42; }\n')
    return path


def counting_compiler(folder: Path) -> tuple[str, Path]:
    """A command that runs g++ and adds a line to a file for every compilation."""
    log, script = folder / "compilations", folder / "counting g++"
    quoted = shlex.quote(str(log))
    script.write_text(
        f'#!/bin/sh\ncase "$*" in *-o*) echo compiled >> {quoted};; esac\nexec g++ "$@"\n'
    )
    script.chmod(0o755)
    log.touch()
    return shlex.quote(str(script)), log


def broken_compiler(folder: Path) -> str:
    script = folder / "broken"
    script.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo broken 1.0 && exit 0\n'
        "for i in $(seq 100); do echo line $i >&2; done\nexit 3\n"
    )
    script.chmod(0o755)
    return str(script)


def answer(library: ctypes.CDLL) -> int:
    found: int = library.answer()
    return found


@needs_compiler
def test_the_second_load_takes_the_first_ones_library(
    cache: Path, source: Path, tmp_path: Path
) -> None:
    compiler, log = counting_compiler(tmp_path)
    first = load_library(source, compiler)
    second = load_library(source, compiler)
    assert answer(first.library) == answer(second.library) == 42
    assert first.identifier == second.identifier
    assert log.read_text() == "compiled\n"
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert [p.suffix for p in cache.iterdir()] == [".so"]


@needs_compiler
def test_source_command_version_and_processor_decide(
    cache: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler, log = counting_compiler(tmp_path)
    identifiers = [load_library(source, compiler).identifier]
    source.write_text('extern "C" int answer() { return 43; }\n')
    changed = load_library(source, compiler)
    assert answer(changed.library) == 43
    identifiers.append(changed.identifier)
    monkeypatch.setattr(build, "_cpu_features", lambda: "another processor")
    identifiers.append(load_library(source, compiler).identifier)
    assert len(set(identifiers)) == 3
    load_library(source, f"{compiler} -g")
    assert log.read_text() == "compiled\n" * 4


@needs_compiler
def test_two_processes_at_once(cache: Path, source: Path, tmp_path: Path) -> None:
    slow = tmp_path / "slow"  # so slow that both find nothing and compile
    slow.write_text('#!/bin/sh\ncase "$*" in *-o*) sleep 1;; esac\nexec g++ "$@"\n')
    slow.chmod(0o755)
    program = (
        "import sys; from pathlib import Path; from slideformer.kernels.build import load_library; "
        "print(load_library(Path(sys.argv[1]), sys.argv[2]).library.answer())"
    )
    command = [sys.executable, "-c", program, str(source), str(slow)]
    running = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in running]
    assert outputs == ["42\n", "42\n"]
    assert [p.suffix for p in cache.iterdir()] == [".so"]


@needs_compiler
@pytest.mark.parametrize("trouble", ["no folder can be made", "writable by others", "no home"])
def test_an_unusable_cache_gives_way_to_a_private_folder(
    trouble: str,
    cache: Path,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    if trouble == "no folder can be made":
        cache.parent.write_text("a file in its place")
    elif trouble == "writable by others":
        cache.mkdir(parents=True)
        cache.chmod(0o777)
    else:
        monkeypatch.delenv("XDG_CACHE_HOME")

        def no_home() -> Path:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(Path, "home", no_home)
    with caplog.at_level(logging.WARNING):
        assert answer(load_library(source, "g++").library) == 42
    assert "cache is not usable" in caplog.text
    assert "XDG_CACHE_HOME" in caplog.text
    assert not list(temporary.iterdir())
    if cache.is_dir():
        assert not list(cache.iterdir())


@needs_compiler
def test_a_damaged_library_is_compiled_anew(
    cache: Path,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    load_library(source, "g++")
    (library,) = cache.iterdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    damaged = tmp_path / "other" / "slideformer" / library.name
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(b"no library")
    with caplog.at_level(logging.WARNING):
        assert answer(load_library(source, "g++").library) == 42
    assert str(damaged) in caplog.text


def test_a_relative_cache_home_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the XDG base directory specification says."""
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert build.cache_folder() == tmp_path / ".cache" / "slideformer"


def test_a_failed_compilation_shows_the_last_lines_and_leaves_nothing(
    cache: Path, source: Path, tmp_path: Path
) -> None:
    with pytest.raises(BuildError, match="exit status 3") as caught:
        load_library(source, broken_compiler(tmp_path))
    lines = str(caught.value).splitlines()
    assert lines[-1] == "line 100"
    assert 2 < len(lines) < 20
    assert not list(cache.iterdir())


def test_a_compiler_that_is_not_there(cache: Path, source: Path) -> None:
    with pytest.raises(BuildError, match="cannot run no-such-compiler: No such file"):
        load_library(source, "no-such-compiler --fast")


def test_kernels_fall_back_with_the_compilers_words(
    cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        kernels = load_kernels(broken_compiler(tmp_path))
    assert (kernels.library, kernels.build) == (None, adamw_library.FALLBACK_BUILD)
    (message,) = caplog.messages
    for words in ("plain PyTorch", "times slower", "line 100", "g++"):
        assert words in message


def test_which_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "ccache my-compiler")
    assert find_compiler() == "ccache my-compiler"
    monkeypatch.delenv("CXX")
    assert find_compiler() is None
    for name in ("clang++", "c++", "g++"):  # each is preferred to those before
        (tmp_path / name).touch(mode=0o755)
        assert find_compiler() == name
    monkeypatch.setenv("CXX", " ")
    assert find_compiler() == "g++"


@pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("g++") is None, reason="needs g++ on x86-64"
)
@pytest.mark.parametrize(("level", "register"), [("v3", "ymm"), ("v4", "zmm")])
def test_the_kernel_is_vectorised_and_rounds_correctly(
    level: str, register: str, tmp_path: Path
) -> None:
    """AVX2 and AVX-512: whole-vector fma, square root and division, and no approximations."""
    options = [o for o in build._OPTIONS if not o.startswith("-march") and o != "-shared"]
    out = tmp_path / "kernel.s"
    command = ["g++", *options, f"-march=x86-64-{level}", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([*command, "-S", str(KERNEL), "-o", str(out)], check=True)
    assembly = out.read_text()
    for instruction in ("vfmadd...ps", "vsqrtps", "vdivps"):
        assert re.search(rf"{instruction}\s.*%{register}", assembly), instruction
    assert not re.search(r"\sv?(rsqrt|rcp)\w*ps\s", assembly)
