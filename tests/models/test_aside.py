"""Folders written aside: what a killed writer leaves goes, what a living one writes stays."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from slideformer.graph.errors import CheckpointError
from slideformer.models import aside
from slideformer.models.aside import AsideFolder, check_output, free_name, remove_orphans


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_it_appears_when_moved_and_vanishes_when_aborted(tmp_path: Path) -> None:
    moved, aborted = (AsideFolder(tmp_path / name) for name in ("kept", "lost"))
    for folder in (moved, aborted):
        (folder.path / "inner").mkdir()
        (folder.path / "inner" / "file").write_text(folder.output.name)
    assert all(name.startswith(".") for name in names(tmp_path))
    assert moved.move() == tmp_path / "kept"
    for folder in (moved, aborted):
        folder.abort()
    assert names(tmp_path) == ["kept"]
    assert (tmp_path / "kept" / "inner" / "file").read_text() == "kept"


def test_one_that_is_aborted_while_it_is_moved_replaces_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = AsideFolder(tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "earlier").touch()
    monkeypatch.setattr(aside, "fsync", lambda _: folder.abort())
    with pytest.raises(FileNotFoundError):
        folder.move(replace=True)
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["earlier"]


def test_what_a_killed_process_leaves_is_removed_by_the_next(tmp_path: Path) -> None:
    ready, done = os.pipe()
    child = os.fork()
    if child == 0:
        (AsideFolder(tmp_path / "out").path / "half").touch()
        os.write(done, b"x")
        signal.pause()
    os.read(ready, 1)
    left = names(tmp_path)
    assert left == [f".out.tmp-{child}"]
    remove_orphans(tmp_path / "out")
    assert names(tmp_path) == left, "its owner lives"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    (tmp_path / ".other.tmp-1").mkdir()
    (tmp_path / f".out.tmp-{child}.removed").mkdir()
    folder = AsideFolder(tmp_path / "out")
    assert names(tmp_path) == [".other.tmp-1", f".out.tmp-{os.getpid()}"]
    folder.abort()


def test_the_same_process_id_as_a_killed_one(tmp_path: Path) -> None:
    """As in a container that is started again."""
    left = tmp_path / f".out.tmp-{os.getpid()}"
    left.mkdir()
    (left / "half").touch()
    folder = AsideFolder(tmp_path / "out")
    assert folder.path == left
    assert names(left) == []
    second = AsideFolder(tmp_path / "out")
    assert second.path != left, "the first one lives"
    folder.abort()
    second.abort()
    assert names(tmp_path) == []


def test_a_free_name_beside_what_is_taken(tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert free_name(output) == output
    output.mkdir()
    assert free_name(output) == output
    (output / "notes").touch()
    (tmp_path / "out-1").touch()
    assert free_name(output) == tmp_path / "out-2"
    with pytest.raises(CheckpointError, match="cannot be created in /proc"):
        free_name(Path("/proc/out"))


@pytest.mark.parametrize("path", ["/", "a\0b", "x" * 300])
def test_a_path_that_no_folder_can_have_is_refused(path: str) -> None:
    with pytest.raises(CheckpointError, match="give another path"):
        check_output(Path(path))
