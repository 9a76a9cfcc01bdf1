"""The cache of tokens: hit by content alone, rebuilt when damaged, private, and never in memory."""

from __future__ import annotations

import json
import logging
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from slideformer.graph.errors import DataError
from slideformer.models.data import cache as cache_module
from slideformer.models.data.batches import BatchStream
from slideformer.models.data.byte_tokenizer import build_byte_tokenizer
from slideformer.models.data.dataset import TokenDataset
from slideformer.models.data.tokenise import RowTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TEXTS = ["one", "and two", "", "a third one that is longer"]


def write(path: Path, texts: list[str] = TEXTS) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def held(dataset: TokenDataset) -> list[list[int]]:
    return [dataset.read(np.array([number]))[0].tolist() for number in range(len(dataset))]


def entries(cache: Path) -> list[Path]:
    return sorted((cache / "slideformer" / "tokens").iterdir())


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many records each call of the tokenizer got."""
    made: list[int] = []
    rows = RowTokenizer.rows

    def counting(self: RowTokenizer, records: Any) -> Iterator[Any]:
        made.append(len(records))
        return rows(self, records)

    monkeypatch.setattr(RowTokenizer, "rows", counting)
    return made


def test_a_file_is_tokenised_once_for_all_names_and_lengths(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, cache: Path, calls: list[int]
) -> None:
    first = TokenDataset.from_file(write(tmp_path / "a.jsonl"), tokenizer, 64)
    again = TokenDataset.from_file(write(tmp_path / "b.json"), tokenizer, 64)
    assert held(first) == held(again)
    short = TokenDataset.from_file(tmp_path / "a.jsonl", tokenizer, 6)
    assert held(short) == [ids[:6] for ids in held(first)]
    assert (short.truncated_rows, short.truncated_tokens) == (2, 23)
    assert calls == [len(TEXTS)]
    assert len(entries(cache)) == 1


def test_whatever_decides_the_tokens_decides_the_entry(
    tmp_path: Path, cache: Path, calls: list[int]
) -> None:
    path = write(tmp_path / "a.jsonl")
    TokenDataset.from_file(path, build_byte_tokenizer(), 64)
    state = path.stat()
    write(path, ["two", *TEXTS[1:]])  # as long, and dated back
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    changed = TokenDataset.from_file(path, build_byte_tokenizer(), 64)
    assert bytes(held(changed)[0][:3]) == b"two"
    templated, bare = build_byte_tokenizer(), build_byte_tokenizer()
    templated.chat_template = "{{ messages }}"
    bare.eos_token = None
    for other in (templated, bare):
        TokenDataset.from_file(path, other, 64)
    assert len(calls) == len(entries(cache)) == 4


def truncate(entry: Path) -> None:
    data = (entry / "ids").read_bytes()
    (entry / "ids").write_bytes(data[:-4])


def flip(entry: Path) -> None:
    data = bytearray((entry / "labels").read_bytes())
    data[1] ^= 1
    (entry / "labels").write_bytes(data)


def garble(entry: Path) -> None:
    (entry / "manifest.json").write_text("{")


def remove(entry: Path) -> None:
    (entry / "offsets").unlink()


def outdate(entry: Path) -> None:
    manifest = json.loads((entry / "manifest.json").read_text())
    (entry / "manifest.json").write_text(json.dumps({**manifest, "version": 2}))


@pytest.mark.parametrize("damage", [truncate, flip, garble, remove, outdate])
def test_a_damaged_entry_is_made_anew(
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    cache: Path,
    calls: list[int],
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[Path], None],
) -> None:
    path = write(tmp_path / "a.jsonl")
    whole = held(TokenDataset.from_file(path, tokenizer, 64))
    (entry,) = entries(cache)
    damage(entry)
    assert held(TokenDataset.from_file(path, tokenizer, 64)) == whole
    assert f"{entry} is damaged" in caplog.text
    assert held(TokenDataset.from_file(path, tokenizer, 64)) == whole
    assert len(calls) == 2
    assert entries(cache) == [entry]


def test_entries_are_private(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, cache: Path
) -> None:
    TokenDataset.from_file(write(tmp_path / "a.jsonl"), tokenizer, 64)
    (entry,) = entries(cache)
    assert stat.S_IMODE(entry.parent.stat().st_mode) == 0o700


def test_a_bad_line_leaves_no_entry(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, cache: Path
) -> None:
    path = write(tmp_path / "a.jsonl", [*TEXTS * 5, "last"])
    path.write_text(path.read_text() + "{")
    with pytest.raises(DataError, match="line 22: malformed JSON"):
        TokenDataset.from_file(path, tokenizer, 64)
    assert entries(cache) == []


def test_without_a_cache_the_process_tokenises_for_itself(
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    path = write(tmp_path / "a.jsonl")
    before = sorted(tmp_path.iterdir())
    dataset = TokenDataset.from_file(path, tokenizer, 64)
    assert [bytes(ids[:-1]).decode() for ids in held(dataset)] == TEXTS
    assert "The cache is not usable" in caplog.text
    assert sorted(tmp_path.iterdir()) == before


def test_a_full_disk_is_one_clear_message(
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(_: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_module, "fsync", full)
    with pytest.raises(DataError, match=r"tokens: No space left .* set XDG_CACHE_HOME"):
        TokenDataset.from_file(write(tmp_path / "a.jsonl"), tokenizer, 64)
    assert entries(cache) == []


def test_a_file_that_grows_while_it_is_read_is_refused(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.jsonl")
    rows = RowTokenizer.rows

    def growing(self: RowTokenizer, records: Any) -> Iterator[Any]:
        with path.open("a") as file:
            file.write('{"text": "more"}\n')
        return rows(self, records)

    monkeypatch.setattr(RowTokenizer, "rows", growing)
    with pytest.raises(DataError, match="changed while it was read; start again"):
        TokenDataset.from_file(path, tokenizer, 64)


def test_another_run_may_be_faster(
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = write(tmp_path / "a.jsonl")
    rows = RowTokenizer.rows

    def overtaken(self: RowTokenizer, records: Any) -> Iterator[Any]:
        monkeypatch.setattr(RowTokenizer, "rows", rows)
        TokenDataset.from_file(path, tokenizer, 64)
        return rows(self, records)

    monkeypatch.setattr(RowTokenizer, "rows", overtaken)
    dataset = TokenDataset.from_file(path, tokenizer, 64)
    assert len(dataset) == len(TEXTS)
    assert len(entries(cache)) == 1


def resident(folder: Path) -> int:
    """Bytes of the mapped files below ``folder`` that are in this process's memory."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line.partition(" ")[0].count("-") == 1 and ":" not in line.partition(" ")[0]:
            inside = str(folder) in line
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def test_the_tokens_stay_on_the_disk(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, cache: Path
) -> None:
    path = write(tmp_path / "a.jsonl", ["x" * 1000] * 3000)
    dataset = TokenDataset.from_file(path, tokenizer, 128)
    assert dataset.tokens == 3000 * 128
    index = dataset.parts[0].starts.nbytes + 2 * 4096
    assert resident(cache) < index, "neither building nor counting leaves them in memory"
    stream = BatchStream(dataset, 4, seed=0)
    for _ in range(20):
        next(stream)
        assert resident(cache) < index
    ids = dataset.parts[0].tokens.ids
    assert ids.sum() > 0
    assert resident(cache) >= ids.nbytes, "it would be seen"


def test_the_digest_is_that_of_the_tokens(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        one = TokenDataset.from_file(write(tmp_path / "a.jsonl"), tokenizer, 64)
    assert "a.jsonl: tokenising; the tokens are kept in" in caplog.text
    bare = build_byte_tokenizer()
    bare.chat_template = None
    same = TokenDataset.from_file(write(tmp_path / "b.jsonl"), bare, 64)
    other = TokenDataset.from_file(write(tmp_path / "c.jsonl", TEXTS[1:]), tokenizer, 64)
    assert one.parts[0].tokens.digest == same.parts[0].tokens.digest
    assert one.parts[0].tokens.digest != other.parts[0].tokens.digest


def test_a_run_goes_on_with_the_same_contents_only(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    state = BatchStream(
        TokenDataset.from_file(write(tmp_path / "a.jsonl"), tokenizer, 64), 2, seed=0
    ).state_dict()
    moved = TokenDataset.from_file(write(tmp_path / "moved.jsonl"), tokenizer, 64)
    BatchStream(moved, 2, seed=0).load_state_dict(state)
    swapped = write(tmp_path / "b.jsonl", [*TEXTS[1:], TEXTS[0]])  # as many of everything
    stream = BatchStream(TokenDataset.from_file(swapped, tokenizer, 64), 2, seed=0)
    with pytest.raises(DataError, match=r"the saved run had contents \d+, this one has \d+; resum"):
        stream.load_state_dict(state)
