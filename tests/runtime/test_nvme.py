"""The NVMe store: bytes come back, space goes back, and every fault ends in a clear message."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import mmap
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slideformer.graph.errors import GraphError, StoreError
from slideformer.memory import extents as layout
from slideformer.memory.extents import Extent, file_nbytes, lay_out_extents, pieces
from slideformer.runtime import nvme
from slideformer.runtime.nvme import NvmeStore, open_store
from slideformer.runtime.nvme_files import RunFile, stale_nbytes

PAGE = 4096
SMALL = {"a": PAGE, "b": 3 * PAGE, "c": 2 * PAGE}


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    """Whatever a test does, the store's threads are gone in the end."""
    before = set(threading.enumerate())
    yield
    left = [t.name for t in threading.enumerate() if t not in before]
    assert not [name for name in left if name.startswith("slideformer-nvme")]


def memory(content: bytes) -> mmap.mmap:
    """Page-aligned memory with this content."""
    found = mmap.mmap(-1, len(content))
    found[:] = content
    return found


def content(extent: Extent, seed: int = 0) -> bytes:
    """Random bytes that fill an extent."""
    return random.Random(f"{extent.name}{seed}").randbytes(extent.nbytes)


def write(store: NvmeStore, extent: Extent, seed: int = 0) -> None:
    """Write an extent and wait."""
    store.write(extent, memory(content(extent, seed))).result()


def read(store: NvmeStore, extent: Extent) -> bytes:
    """Read an extent and wait."""
    target = memory(bytes(extent.nbytes))
    store.read(extent, target).result()
    return target[:]


@pytest.fixture
def extents() -> dict[str, Extent]:
    """Three small extents."""
    return lay_out_extents(SMALL)


@pytest.fixture
def store(tmp_path: Path, extents: dict[str, Extent]) -> Iterator[NvmeStore]:
    """A store in one folder."""
    made = open_store([tmp_path], extents)
    yield made
    made.close()


# Where extents lie


@given(
    sizes=st.lists(st.integers(1, 9).map(lambda n: n * PAGE), min_size=1, max_size=6),
    files=st.integers(1, 4),
    stripe=st.integers(1, 4).map(lambda n: n * PAGE),
)
def test_pieces_tile_extents_and_share_no_byte(sizes: list[int], files: int, stripe: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "STRIPE", stripe)
        found = lay_out_extents({f"e{i}": size for i, size in enumerate(sizes)})
        room = file_nbytes(sum(sizes), files)
        assert sum(room) == sum(sizes), "files take no more than the plan says"
        used: set[tuple[int, int]] = set()
        for extent in found.values():
            reached = 0
            for piece in pieces(extent, files):
                assert piece.start == reached
                assert piece.stop - piece.start <= stripe
                reached = piece.stop
                for page in range(0, piece.stop - piece.start, PAGE):
                    place = (piece.file, piece.offset + page)
                    assert place not in used
                    assert place[1] + PAGE <= room[piece.file]
                    used.add(place)
            assert reached == extent.nbytes


def test_an_extent_of_odd_size_is_refused_by_name() -> None:
    with pytest.raises(GraphError, match=r"odd is on NVMe with 4,097 bytes; use a multiple"):
        lay_out_extents({"odd": PAGE + 1})


# Bytes come back


@settings(max_examples=15)
@given(
    order=st.lists(st.tuples(st.sampled_from(sorted(SMALL)), st.integers(1, 9)), max_size=8),
    folders=st.integers(1, 3),
    checksums=st.booleans(),
)
def test_what_was_written_last_is_read(
    tmp_path_factory: pytest.TempPathFactory,
    order: list[tuple[str, int]],
    folders: int,
    checksums: bool,
) -> None:
    extents = lay_out_extents(SMALL)
    disks = [tmp_path_factory.mktemp("disk") for _ in range(folders)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "STRIPE", 2 * PAGE)
        store = open_store(disks, extents, checksums=checksums)
        expected = {name: bytes(extent.nbytes) for name, extent in extents.items()}
        for name, seed in order:
            write(store, extents[name], seed)
            expected[name] = content(extents[name], seed)
        assert {name: read(store, extent) for name, extent in extents.items()} == expected
        store.close()


def test_transfers_are_awaited_in_asyncio(tmp_path: Path, extents: dict[str, Extent]) -> None:
    async def use() -> bytes:
        store = await NvmeStore.open([tmp_path], extents)
        source, target = memory(content(extents["b"])), memory(bytes(3 * PAGE))
        await asyncio.wrap_future(store.write(extents["b"], source))
        await asyncio.wrap_future(store.read(extents["b"], target))
        store.close()
        return target[:]

    assert asyncio.run(use()) == content(extents["b"])


# Files


def test_files_are_private_preallocated_and_described(
    tmp_path: Path, store: NvmeStore, extents: dict[str, Extent]
) -> None:
    (path,) = store.paths
    for file in (path, path.with_suffix(".json")):
        assert file.stat().st_mode & 0o777 == 0o600
    assert path.stat().st_size == 6 * PAGE
    assert path.stat().st_blocks * 512 >= 6 * PAGE
    manifest = json.loads(path.with_suffix(".json").read_text())
    assert manifest["pid"] == os.getpid()
    assert manifest["extents"]["b"] == [extents["b"].offset, 3 * PAGE]
    store.close()
    store.close()
    assert list(tmp_path.iterdir()) == []


def test_direct_io_is_used_where_it_works_and_said_where_not(
    tmp_path: Path,
    extents: dict[str, Extent],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    original = os.preadv

    def refuse(descriptor: int, *args: Any) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr("slideformer.runtime.nvme_files.os.preadv", refuse)
    store = open_store([tmp_path], extents)
    monkeypatch.setattr("slideformer.runtime.nvme_files.os.preadv", original)
    write(store, extents["a"])
    assert read(store, extents["a"]) == content(extents["a"])
    assert not store.direct
    store.close()
    (record,) = caplog.records
    assert f"{tmp_path}: the file system has no direct I/O" in record.getMessage()


HOLD = """
import sys, time
from pathlib import Path
from slideformer.memory.extents import lay_out_extents
from slideformer.runtime.nvme import open_store
store = open_store([Path(sys.argv[1])], lay_out_extents({"a": 4096}))
print(store.paths[0], flush=True)
time.sleep(600)
"""


def test_files_of_a_killed_run_go_at_the_next_start_and_those_of_a_live_one_stay(
    tmp_path: Path, extents: dict[str, Extent], caplog: pytest.LogCaptureFixture
) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        paths = [Path(run.stdout.readline().strip()) for run in runs if run.stdout]
        alive, killed = paths
        runs[1].send_signal(signal.SIGKILL)
        runs[1].wait()
        assert killed.exists(), "nobody could clean up"
        assert stale_nbytes(tmp_path) == 4096, "of the killed one alone"
        other = tmp_path / "slideformer-notes.txt"
        other.write_text("the user's own")
        with caplog.at_level(logging.INFO):
            store = open_store([tmp_path], extents)
        assert not killed.exists()
        assert not killed.with_suffix(".json").exists()
        assert alive.exists()
        assert alive.with_suffix(".json").exists()
        assert other.exists()
        assert f"removed {killed}, left by a run that was killed" in caplog.text
        store.close()
    finally:
        for run in runs:
            run.kill()
            run.wait()
            if run.stdout:
                run.stdout.close()


def test_a_file_that_was_moved_gives_its_space_back(
    tmp_path: Path, extents: dict[str, Extent], caplog: pytest.LogCaptureFixture
) -> None:
    disk, elsewhere = tmp_path / "disk", tmp_path / "elsewhere"
    disk.mkdir()
    store = open_store([disk], extents)
    write(store, extents["a"])
    (path,) = store.paths
    disk.rename(elsewhere)
    store.close()
    assert (elsewhere / path.name).stat().st_blocks == 0
    assert f"{path} cannot be removed (No such file or directory)" in caplog.text
    open_store([elsewhere], extents).close()
    assert list(elsewhere.iterdir()) == []


class Killed(BaseException):
    """Ends what a process does, and cannot be caught there."""


def test_nothing_is_left_for_good_by_runs_that_are_killed_while_they_remove_files(
    tmp_path: Path, extents: dict[str, Extent], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that ends, and one that begins and clears up behind it."""
    unlink, calls = Path.unlink, 0

    def first_of_two(path: Path, missing_ok: bool = False) -> None:
        nonlocal calls
        calls += 1
        if calls % 2 == 0:
            raise Killed
        unlink(path, missing_ok=missing_ok)

    store = open_store([tmp_path], extents)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", first_of_two)
        with pytest.raises(Killed):
            store.close()
        os.close(store._files[0].descriptor)  # as a process that ends
        with pytest.raises(Killed):
            open_store([tmp_path], extents)
    open_store([tmp_path], extents).close()
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_nobody_closes_is_removed_with_the_process(tmp_path: Path) -> None:
    program = HOLD.replace("time.sleep(600)", "")
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, capture_output=True)
    assert list(tmp_path.iterdir()) == []


# Faults


def failing(
    original: Callable[..., int], error: OSError | int, after: int = 0
) -> Callable[..., int]:
    """A system call that fails, or returns that number, from a call on."""
    calls = 0

    def call(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        nonlocal calls
        calls += 1
        if calls <= after:
            return original(descriptor, buffers, offset)
        if isinstance(error, OSError):
            raise error
        return error

    return call


FAULTS: dict[str, tuple[str, OSError | int, str]] = {
    "short read": ("preadv", 0, "only 0 of 4,096 bytes are there"),
    "failing read": ("preadv", OSError(errno.EIO, "Input/output error"), "Input/output error"),
    "failing write": ("pwritev", OSError(errno.EIO, "Input/output error"), "Input/output error"),
    "full disk": ("pwritev", OSError(errno.ENOSPC, "No space left"), "the disk is full"),
    "stale": ("preadv", OSError(errno.ESTALE, "Stale file handle"), "Stale file handle"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_names_extent_and_path(
    name: str, store: NvmeStore, extents: dict[str, Extent], monkeypatch: pytest.MonkeyPatch
) -> None:
    call, error, reason = FAULTS[name]
    monkeypatch.setattr(nvme.os, call, failing(getattr(os, call), error))
    (path,) = store.paths
    with pytest.raises(StoreError, match=rf"{path}: cannot .* of extent a at 0: {reason}"):
        (write if call == "pwritev" else read)(store, extents["a"])


def test_a_corrupted_byte_is_noticed_unless_checksums_are_off(
    tmp_path: Path, extents: dict[str, Extent]
) -> None:
    for checksums in (True, False):
        store = open_store([tmp_path], extents, checksums=checksums)
        write(store, extents["b"])
        with store.paths[0].open("r+b") as file:
            file.seek(extents["b"].offset + PAGE)
            file.write(b"!!")
        if checksums:
            with pytest.raises(StoreError, match=r"of extent b at 4,096: .*not those that were"):
                read(store, extents["b"])
        else:
            assert read(store, extents["b"]) != content(extents["b"])
        store.close()


def test_a_file_that_was_cut_is_a_short_read(store: NvmeStore, extents: dict[str, Extent]) -> None:
    os.truncate(store.paths[0], extents["c"].offset + PAGE)
    with pytest.raises(StoreError, match=r"of extent c .*only 4,096 of 8,192 bytes are there"):
        read(store, extents["c"])


def test_a_removed_folder_ends_the_run(store: NvmeStore, extents: dict[str, Extent]) -> None:
    store.paths[0].unlink()
    for use in (read, write):
        with pytest.raises(StoreError, match=r"extent a .*its folder, has been removed"):
            use(store, extents["a"])


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.EROFS, r"NVMe folder .* cannot be used \(Read-only file system\); give a folder"),
        (errno.EACCES, r"NVMe folder .* cannot be used \(Permission denied\); give a folder"),
    ],
)
def test_a_folder_that_takes_no_files_is_refused(
    tmp_path: Path,
    extents: dict[str, Extent],
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    message: str,
) -> None:
    original = os.open

    def refuse(path: Any, flags: int, *args: Any, **more: Any) -> int:
        if flags & os.O_CREAT:
            raise OSError(code, os.strerror(code))
        return original(path, flags, *args, **more)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(StoreError, match=message):
        open_store([tmp_path], extents)


def test_a_folder_that_is_given_twice_is_refused_by_name(
    tmp_path: Path, extents: dict[str, Extent]
) -> None:
    disk, other = tmp_path / "disk", tmp_path / "other"
    disk.mkdir()
    other.symlink_to(disk)
    with pytest.raises(StoreError, match=r"NVMe folder .*other is given twice; give each --nvme"):
        open_store([disk, other], extents)
    assert list(disk.iterdir()) == []


def test_a_missing_folder_is_refused(tmp_path: Path, extents: dict[str, Extent]) -> None:
    with pytest.raises(StoreError, match=r"no-such cannot be used \(No such file or directory\)"):
        open_store([tmp_path / "no-such"], extents)


def test_a_disk_without_room_is_refused_and_nothing_is_left(
    tmp_path: Path, extents: dict[str, Extent], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second folder, so that the first one's file must go again."""
    original, calls = os.posix_fallocate, 0

    def allocate(*args: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(*args)

    monkeypatch.setattr(os, "posix_fallocate", allocate)
    disks = [tmp_path / "one", tmp_path / "two"]
    for disk in disks:
        disk.mkdir()
    with pytest.raises(StoreError, match=r"no room in NVMe folder .*two: the run needs 0\.0 MiB"):
        open_store(disks, extents)
    assert [list(disk.iterdir()) for disk in disks] == [[], []]


def test_a_limit_on_the_size_of_files_is_no_lack_of_room(
    tmp_path: Path, extents: dict[str, Extent], monkeypatch: pytest.MonkeyPatch
) -> None:
    def allocate(*_: int) -> None:
        raise OSError(errno.EFBIG, "File too large")

    monkeypatch.setattr(os, "posix_fallocate", allocate)
    with pytest.raises(StoreError, match=r"takes no file of 0\.0 MiB.*ulimit -f"):
        open_store([tmp_path], extents)
    assert list(tmp_path.iterdir()) == []


def test_a_slow_disk_is_reported_once_and_does_its_work(
    store: NvmeStore,
    extents: dict[str, Extent],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(nvme, "SLOW", float("inf"))
    monkeypatch.setattr(nvme, "_SAMPLE", 2 * PAGE)
    for seed in range(4):
        write(store, extents["a"], seed)
    assert read(store, extents["a"]) == content(extents["a"], 3)
    (record,) = caplog.records
    assert "NVMe is slow: writes of" in record.getMessage()
    assert "--nvme" in record.getMessage()


def test_transfers_at_the_same_time_share_the_time_that_a_disk_is_judged_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    size, seconds, several = 4 << 20, 0.2, "abcd"
    monkeypatch.setattr(nvme, "SLOW", float("inf"))
    monkeypatch.setattr(nvme, "_SAMPLE", len(several) * size)
    monkeypatch.setattr(RunFile, "write", lambda *_: time.sleep(seconds))
    extents = lay_out_extents(dict.fromkeys(several, size))
    store = open_store([tmp_path], extents)
    for each in [store.write(extent, bytes(size)) for extent in extents.values()]:
        each.result()
    store.close()
    (record,) = caplog.records
    found = re.search(r"writes of (\d+) MB/s", record.getMessage())
    assert found is not None
    one_by_one = size / seconds / 1e6
    assert int(found[1]) > 2 * one_by_one
