"""Checkpoints of byte ranges: what is read is what was written, or the file at fault is named."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slideformer.graph.buffers import PAGE
from slideformer.graph.errors import CheckpointError
from slideformer.runtime import checkpoints, direct_io
from slideformer.runtime.checkpoints import MANIFEST, RangeReader, RangeWriter
from slideformer.runtime.direct_io import bypass_cache

PIECE = 2 * PAGE
SIZE = 5 * PAGE


@pytest.fixture(autouse=True, scope="module")
def small_pieces() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "PIECE", PIECE)
        yield


def content(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def write(folder: Path, files: dict[str, bytes], cuts: dict[str, list[int]] | None = None) -> None:
    """Write files in the ranges between ``cuts``: first those behind the second, at once."""
    folder.mkdir()
    with RangeWriter(folder, {name: len(whole) for name, whole in files.items()}) as writer:
        for name, whole in files.items():
            ends = [0, *(cuts or {}).get(name, []), len(whole)]
            writer.write(name, {b: whole[b:e] for b, e in list(pairwise(ends))[2:]})
            for begin, end in reversed(list(pairwise(ends))[:2]):
                writer.write(name, {begin: whole[begin:end]})
        writer.add("added/note", b"a note")
        writer.add("added/empty", b"")
        writer.finish({"step": 3})


@pytest.mark.parametrize("direct", [True, False])
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_range_of_what_was_written_in_any_ranges_reads_back(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    data: st.DataObject,
    direct: bool,
) -> None:
    if not direct:
        monkeypatch.setattr(direct_io, "bypass_cache", lambda _: False)
    folder = tmp_path_factory.mktemp("ranges") / "checkpoint"
    whole = content(data.draw(st.integers(1, 8 * PAGE)))
    positions = st.integers(0, len(whole))
    cuts = sorted(data.draw(st.sets(positions, max_size=5)))
    write(folder, {"a/b": whole, "c": content(30)}, {"a/b": cuts})
    reader = RangeReader(folder)
    assert reader.info == {"step": 3}
    assert reader.content("added/note") == b"a note"
    assert reader.content("added/empty") == b""
    assert reader.files == {"a/b": len(whole), "c": 30, "added/note": 6, "added/empty": 0}
    begin, end = sorted((data.draw(positions), data.draw(positions)))
    into = bytearray(end - begin)
    reader.read("a/b", begin, into)
    assert into == whole[begin:end]


def test_a_folder_without_a_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is not a checkpoint .* no manifest\.json"):
        RangeReader(tmp_path)
    with RangeWriter(tmp_path, {"a": 4}) as writer:
        writer.write("a", {0: b"1234"})
    with pytest.raises(CheckpointError, match="no manifest"):
        RangeReader(tmp_path)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 2)


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


@pytest.mark.parametrize(
    ("harm", "words"), [(cut, "is cut short"), (grow, "was altered"), (Path.unlink, "cannot be")]
)
def test_a_file_of_another_size_is_refused_at_once(
    tmp_path: Path, harm: Callable[[Path], None], words: str
) -> None:
    folder = tmp_path / "checkpoint"
    write(folder, {"units/a": content(SIZE), "units/b": content(300)})
    harm(folder / "units/b")
    with pytest.raises(CheckpointError, match=f"units/b {words}"):
        RangeReader(folder)


@settings(max_examples=20)
@given(position=st.integers(0, SIZE - 1), bit=st.integers(0, 7))
def test_any_bit_that_changed_is_seen_when_it_is_read(
    tmp_path_factory: pytest.TempPathFactory, position: int, bit: int
) -> None:
    folder = tmp_path_factory.mktemp("bits") / "checkpoint"
    write(folder, {"units/a": content(SIZE)}, {"units/a": [PAGE + 130]})
    path = folder / "units/a"
    changed = bytearray(path.read_bytes())
    changed[position] ^= 1 << bit
    path.write_bytes(changed)
    reader = RangeReader(folder)
    with pytest.raises(CheckpointError, match=r"units/a: bytes .* are not those that were written"):
        reader.content("units/a")
    with pytest.raises(CheckpointError, match="units/a"):
        reader.read("units/a", position, bytearray(1))


def alter(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def harm(path: Path) -> None:
        found = json.loads(path.read_text())
        change(found)
        path.write_text(json.dumps(found))

    return harm


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (cut, "is damaged or was altered"),
        (alter(lambda m: m["info"].update(step=4)), "its digest does not fit"),
        (alter(lambda m: m.pop("digest")), "is damaged"),
        (alter(lambda m: m.update(version=2)), "is of version 2, this program reads 1"),
        (alter(lambda m: m.update(format="other")), "of another format"),
        (lambda path: path.write_text("[1]"), "is damaged"),
        (lambda path: path.write_text("[" * 100_000), "is damaged"),
    ],
)
def test_a_manifest_that_changed_is_refused(
    tmp_path: Path, harm: Callable[[Path], None], words: str
) -> None:
    folder = tmp_path / "checkpoint"
    write(folder, {"a": content(SIZE)})
    harm(folder / MANIFEST)
    with pytest.raises(CheckpointError, match=f"{MANIFEST}.*{words}"):
        RangeReader(folder)


def test_whole_pages_bypass_the_page_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, moved = os.pwrite, {True: 0, False: 0}
    with (tmp_path / "tried").open("wb+") as file:
        direct = 7 * PAGE if bypass_cache(file.fileno()) else 0

    def seen(descriptor: int, part: memoryview, offset: int) -> int:
        moved[bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)] += len(part)
        return write(descriptor, part, offset)

    monkeypatch.setattr(os, "pwrite", seen)
    with RangeWriter(tmp_path, {"a": 9 * PAGE}) as writer:
        writer.write("a", {10: content(8 * PAGE)})
        writer.write("a", {0: content(10), 8 * PAGE + 10: content(PAGE - 10)})
        writer.finish({})
    assert moved == {True: direct, False: 9 * PAGE - direct}


def test_a_disk_without_room_refuses_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"No space left|File too large"):
        RangeWriter(tmp_path, {"small": 1000, "large": 1 << 50})


def test_a_file_system_that_sets_no_room_aside_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        ctypes.set_errno(errno.EOPNOTSUPP)
        return -1

    monkeypatch.setattr(direct_io._libc, "fallocate", refuse)
    whole = content(SIZE + 3)
    write(tmp_path / "checkpoint", {"a": whole}, {"a": [PAGE + 1, 3 * PAGE]})
    assert RangeReader(tmp_path / "checkpoint").content("a") == whole


@pytest.mark.parametrize("largest", [0, 1, 700, PAGE])
def test_what_a_direct_write_leaves_goes_through_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, largest: int
) -> None:
    """On a disk whose blocks are larger than a page, 0, it is refused only now."""
    write_to = os.pwrite

    def short(descriptor: int, part: memoryview, offset: int) -> int:
        if not fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            return write_to(descriptor, part, offset)
        if not largest or offset % PAGE:
            raise OSError(errno.EINVAL, "Invalid argument")
        with (tmp_path / "checkpoint" / "a").open("rb+") as file:
            return write_to(file.fileno(), part[:largest], offset)

    monkeypatch.setattr(os, "pwrite", short)
    whole = content(SIZE + 3)
    write(tmp_path / "checkpoint", {"a": whole}, {"a": [PAGE + 1, 3 * PAGE]})
    assert RangeReader(tmp_path / "checkpoint").content("a") == whole


@pytest.mark.parametrize("gone", ["checkpoint", "checkpoint/units", "checkpoint/units/a"])
@pytest.mark.parametrize("direct", [True, False])
def test_what_was_removed_while_it_was_written_is_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone: str, direct: bool
) -> None:
    if not direct:
        monkeypatch.setattr(direct_io, "bypass_cache", lambda _: False)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    with RangeWriter(folder, {"units/a": SIZE}) as writer:
        writer.write("units/a", {0: content(SIZE)})
        (tmp_path / gone).rename(tmp_path / "moved")
        if folder.exists():
            writer.add("model/deeper/note", b"a note")
        else:
            with pytest.raises(FileNotFoundError):
                writer.add("model/deeper/note", b"a note")
        with pytest.raises(FileNotFoundError):
            writer.finish({})
    assert not (folder / MANIFEST).exists()
    assert folder.exists() == (gone != "checkpoint"), "what was removed does not come back"


def test_a_file_that_fails_as_it_is_closed_is_closed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really, closed = os.close, []

    def failing(descriptor: int) -> None:
        closed.append(descriptor)
        really(descriptor)
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "close", failing)
        with RangeWriter(tmp_path, {"a": SIZE, "b": SIZE}) as writer:
            writer.close()
    assert len(closed) == len(set(closed)) >= 2


@pytest.mark.parametrize("possible", [0, 2])
def test_a_checkpoint_without_its_threads_is_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, possible: int
) -> None:
    before = threading.active_count()
    start, left = threading.Thread.start, iter(range(possible))

    def few(thread: threading.Thread) -> None:
        if next(left, None) is None:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", few)
    with pytest.raises(OSError, match="can't start new thread"):
        RangeWriter(tmp_path, {"a": SIZE})
    assert list(tmp_path.iterdir()) == []
    assert threading.active_count() == before


def test_what_the_disk_refuses_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with RangeWriter(tmp_path, {"a": 1000}) as writer:
        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match="No space left"):
            writer.write("a", {0: content(1000)})
    assert not (tmp_path / MANIFEST).exists()
