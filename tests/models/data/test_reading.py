"""Reading training files: every accepted form, and every fault with its file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slideformer.graph.errors import DataError
from slideformer.models.data import reading
from slideformer.models.data.reading import (
    ChatRecord,
    CompletionRecord,
    Message,
    TextRecord,
    is_plain_text,
    read_records,
    read_text,
)

GOOD = b'{"text": "fine"}\n'


def records_of(tmp_path: Path, content: bytes) -> list[reading.Record]:
    path = tmp_path / "train.jsonl"
    path.write_bytes(content)
    return list(read_records(path))


def error_of(tmp_path: Path, content: bytes) -> str:
    with pytest.raises(DataError) as caught:
        records_of(tmp_path, content)
    return str(caught.value)


def test_forms_may_be_mixed_and_blank_lines_are_skipped_but_counted(tmp_path: Path) -> None:
    content = (
        b'{"text": "a"}\n\n  \r\n{"completion": "c", "prompt": "p"}\r\n'
        b'{"messages": [{"role": "tool", "content": ""}, {"content": "y", "role": "x"}]}'
    )
    path = tmp_path / "train.jsonl"
    assert records_of(tmp_path, content) == [
        TextRecord(f"{path}, line 1", "a"),
        CompletionRecord(f"{path}, line 4", "p", "c"),
        ChatRecord(f"{path}, line 5", (Message("tool", ""), Message("x", "y"))),
    ]


def test_other_keys_are_ignored(tmp_path: Path) -> None:
    content = (
        b'{"id": 1, "text": "a", "meta": {"text": 2}, "prompt": null}\n'
        b'{"prompt": "p", "source": "web", "completion": "c"}\n'
        b'{"prompt": "p", "messages": [{"role": "r", "content": "c", "tool_calls": [1]}], "": 0}\n'
    )
    path = tmp_path / "train.jsonl"
    assert records_of(tmp_path, content) == [
        TextRecord(f"{path}, line 1", "a"),
        CompletionRecord(f"{path}, line 2", "p", "c"),
        ChatRecord(f"{path}, line 3", (Message("r", "c"),)),
    ]


def test_a_line_ends_at_newline_only(tmp_path: Path) -> None:
    text = "a\u2028b\u0085c\x0bd"
    content = json.dumps({"text": text}, ensure_ascii=False).encode()
    (record,) = records_of(tmp_path, content)
    assert isinstance(record, TextRecord)
    assert record.text == text


def test_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (record,) = records_of(tmp_path, b"\xef\xbb\xbf" + GOOD)
    assert isinstance(record, TextRecord)
    path = tmp_path / "train.txt"
    path.write_bytes(b"\xef\xbb\xbfword")
    assert "".join(read_text(path)) == "word"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', "malformed JSON at column 13"),
        (b"[", "malformed JSON"),
        (b'{"text": "a"} {"text": "b"}', "each line must be one whole JSON object"),
        (b"[" * 200_000, "cannot be read"),
        (b"9" * 5000, "cannot be read"),
        (b"[1]", "found a list, not a JSON object"),
        (b'"text"', "found a string, not a JSON object"),
        (b"null", "found null, not a JSON object"),
        (b"true", "found a boolean, not a JSON object"),
        (b"{}", "the keys (none)"),
        (b'{"txt": "a"}', "the keys ('txt')"),
        (b'{"instruction": "a", "id": 1}', "the keys ('instruction', 'id') are those of no"),
        (b'{"id": 1}', reading.ACCEPTED_FORMS),
        (b'{"prompt": "a"}', '{"prompt": string, "completion": string}'),
        (b'{"completion": "a"}', '{"text": string}'),
        (
            b'{"prompt": "a", "completion": "b", "text": "c"}',
            "keys of 2 forms, 'text' and also 'prompt', 'completion'; keep those of one",
        ),
        (b'{"messages": [], "text": ""}', "keys of 2 forms, 'text' and also 'messages'"),
        (b'{"completion": "", "messages": [], "prompt": "", "text": ""}', "keys of 3 forms"),
        (b'{"text": 1}', "'text' is a number; it must be a string"),
        (b'{"text": null}', "'text' is null"),
        (b'{"text": ["a"]}', "'text' is a list"),
        (b'{"prompt": "a", "completion": {}}', "'completion' is an object"),
        (b'{"prompt": false, "completion": ""}', "'prompt' is a boolean"),
        (b'{"messages": "hi"}', "'messages' is a string; it must be a list"),
        (b'{"messages": []}', "'messages' is empty"),
        (b'{"messages": ["hi"]}', "'messages[0]' is a string, not an object"),
        (b'{"messages": [{"role": "user"}]}', "'messages[0]' has the keys ('role')"),
        (b'{"messages": [{}]}', "'messages[0]' has the keys (none)"),
        (
            b'{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": []}]}',
            "'messages[1].content' is a list; it must be a string",
        ),
        (b'{"messages": [{"role": 1, "content": "a"}]}', "'messages[0].role' is a number"),
        (
            b'{"messages": [{"role": "assistant", "tool_calls": []}]}',
            "'messages[0]' has the keys ('role', 'tool_calls'); a message needs 'role' and",
        ),
        (
            b'{"messages": [{"role": "assistant", "content": null, "tool_calls": []}]}',
            "'messages[0].content' is null",
        ),
        (b'{"text": "ab\\ud800"}', "half a surrogate pair at character 2"),
        (b'{"text": "\xff"}', "is not UTF-8 (byte 0xFF"),
    ],
)
def test_faulty_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    # Two lines before it, one of them blank.
    error = error_of(tmp_path, GOOD + b"\n" + line + b"\n" + GOOD)
    assert error.startswith(f"{tmp_path / 'train.jsonl'}, line 3: ")
    assert message in error


def test_file_without_records(tmp_path: Path) -> None:
    assert "train.jsonl: is empty" in error_of(tmp_path, b"")
    assert "holds only blank lines" in error_of(tmp_path, b"\n  \n\r\n")


@pytest.mark.parametrize("read", [is_plain_text, read_text, read_records])
def test_missing_file_and_directory(tmp_path: Path, read: object) -> None:
    assert callable(read)

    def exhaust(path: Path) -> None:
        result = read(path)
        assert not isinstance(result, bool)
        list(result)

    with pytest.raises(DataError, match=r"none\.jsonl: there is no such file"):
        exhaust(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="is a directory; name a "):
        exhaust(tmp_path)


def test_unopenable_file(tmp_path: Path) -> None:
    loop = tmp_path / "loop.txt"
    loop.symlink_to(loop)
    with pytest.raises(DataError, match="cannot be opened"):
        list(read_text(loop))


def test_kind_of_file_is_told_by_its_ending(tmp_path: Path) -> None:
    for name, plain in (("a.txt", True), ("a.TXT", True), ("a.json", False), ("a.jsonl", False)):
        (tmp_path / name).touch()
        assert is_plain_text(tmp_path / name) is plain
    for name in ("a.csv", "a"):
        (tmp_path / name).touch()
        with pytest.raises(DataError, match=r"use \.jsonl or \.json .* or \.txt"):
            is_plain_text(tmp_path / name)


def test_empty_text(tmp_path: Path) -> None:
    path = tmp_path / "train.txt"
    path.touch()
    with pytest.raises(DataError, match=r"train\.txt: is empty"):
        list(read_text(path))


@pytest.mark.parametrize("block", [1, 2, 3, 1 << 18])
def test_text_that_is_not_utf8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(reading, "_BLOCK_BYTES", block)
    path = tmp_path / "train.txt"
    for content, line in (
        (b"\xff\xfea\x00", 1),
        ("ö\nö\n\nx".encode() + b"\xe9\ny\n", 4),
        ("ö\n€".encode()[:-1], 2),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"train\.txt, line {line}: is not UTF-8"):
            list(read_text(path))


@given(text=st.text(min_size=1), block=st.integers(1, 7))
def test_text_is_read_unchanged(
    tmp_path_factory: pytest.TempPathFactory, text: str, block: int
) -> None:
    path = tmp_path_factory.mktemp("text") / "train.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "_BLOCK_BYTES", block)
        assert "".join(read_text(path)) == text.removeprefix("\ufeff")
