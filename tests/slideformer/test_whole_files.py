"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from slideformer.whole_files import write_whole


def test_a_file_takes_the_place_of_another(tmp_path: Path) -> None:
    for text in ("one", "zwei ü"):
        write_whole(tmp_path / "file", text)
        assert [path.read_text(encoding="utf-8") for path in tmp_path.iterdir()] == [text]


@pytest.mark.parametrize("way", ["folder in its place", "no folder for it"])
def test_what_cannot_be_written_leaves_nothing_behind(tmp_path: Path, way: str) -> None:
    path = tmp_path / "file" if way == "folder in its place" else tmp_path / "absent" / "file"
    if way == "folder in its place":
        path.mkdir()
    before = list(tmp_path.iterdir())
    with pytest.raises(OSError, match="file"):
        write_whole(path, "text")
    assert list(tmp_path.iterdir()) == before


@pytest.mark.parametrize("path", ["/", ".", ".."])
def test_a_folder_without_a_name_is_no_file(path: str) -> None:
    with pytest.raises(IsADirectoryError):
        write_whole(Path(path), "text")


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_one_and_what_it_leads_to_is_written(tmp_path: Path, there: bool) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    if there:
        target.write_text("old")
    link.symlink_to(target)
    write_whole(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"


def test_a_pipe_is_written_into_and_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_whole(pipe, "text")
        assert os.read(reader, 100) == b"text"
    finally:
        os.close(reader)
    assert pipe.is_fifo()


def test_bytes_are_written_as_they_are(tmp_path: Path) -> None:
    write_whole(tmp_path / "file", b"\x89\r\n")
    assert (tmp_path / "file").read_bytes() == b"\x89\r\n"


def test_a_disk_that_fills_leaves_the_file_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_whole(tmp_path / "file", "old")

    def half(path: Path, content: bytes) -> int:
        with path.open("wb") as file:
            file.write(content[:1])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OSError, match="No space"):
        write_whole(tmp_path / "file", "new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]
