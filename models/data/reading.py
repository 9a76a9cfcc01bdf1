"""Training files: reads plain text and JSON lines, and turns every fault into a ``DataError``.

Files are streamed, so memory is bounded by the longest line. A fault names the file and, where
there is one, the line. Nothing here knows a tokenizer.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from slideformer.graph.errors import DataError

ACCEPTED_FORMS = (
    '{"text": string}, {"prompt": string, "completion": string} or '
    '{"messages": [{"role": string, "content": string}, ...]}'
)
_FORMS = (("text",), ("prompt", "completion"), ("messages",))
"""The keys that make a record one of each form, in the order of `ACCEPTED_FORMS`."""
_TEXT_SUFFIXES = (".txt",)
_RECORD_SUFFIXES = (".jsonl", ".json")
_BLOCK_BYTES = 1 << 18


@dataclass(frozen=True)
class TextRecord:
    """A text to learn from its first token to its last. ``where`` names file and line."""

    where: str
    text: str


@dataclass(frozen=True)
class CompletionRecord:
    """A prompt, and the completion to learn. ``where`` names file and line."""

    where: str
    prompt: str
    completion: str


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; which roles exist is the chat template's to say."""

    role: str
    content: str


@dataclass(frozen=True)
class ChatRecord:
    """A conversation of at least one message. ``where`` names file and line."""

    where: str
    messages: tuple[Message, ...]


Record = TextRecord | CompletionRecord | ChatRecord


def is_known_suffix(path: Path) -> bool:
    """Whether a path ends like a training file."""
    return path.suffix.lower() in _TEXT_SUFFIXES + _RECORD_SUFFIXES


def is_plain_text(path: Path) -> bool:
    """True for a ``.txt`` file, False for JSON lines.

    Raises DataError for any other ending and for a file that cannot be opened.
    """
    open_file(path).close()  # a directory is called a directory, not a file of unknown ending
    suffix = path.suffix.lower()
    if not is_known_suffix(path):
        raise DataError(
            f"{path}: the ending {suffix!r} names no known kind of training file; use .jsonl or "
            ".json (one JSON object on each line) or .txt (plain text)"
        )
    return suffix in _TEXT_SUFFIXES


def read_text(path: Path) -> Iterator[str]:
    """The decoded text of a UTF-8 file, block by block and unchanged but for a byte order mark.

    Raises DataError for a file that is missing, a directory, unreadable, empty or not UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    lines_before = 0
    with open_file(path) as file:
        block = _read(path, file)
        if not block:
            raise _empty(path)
        while block:
            try:
                yield decoder.decode(block)
            except UnicodeDecodeError as error:
                raise _not_utf8(path, lines_before + 1, error) from None
            lines_before += block.count(b"\n")
            block = _read(path, file)
    try:
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise _not_utf8(path, lines_before + 1, error) from None


def read_records(path: Path) -> Iterator[Record]:
    """The records of a JSON-lines file in their order; blank lines are skipped.

    Keys beside those of a record's form, or of a message, are ignored.

    Raises DataError as :func:`read_text` does, for a line that is not one JSON object of an
    accepted form or has the keys of several, and for a file without a record.
    """
    line = records = 0
    with open_file(path) as file:
        for line, raw in enumerate(_lines(path, file), start=1):
            try:
                text = raw.decode("utf-8-sig" if line == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise _not_utf8(path, line, error) from None
            if text.strip():
                records += 1
                yield _record(f"{path}, line {line}", text.rstrip())
    if not line:
        raise _empty(path)
    if not records:
        raise DataError(f"{path}: holds only blank lines; each line should be {ACCEPTED_FORMS}")


def open_file(path: Path) -> BufferedReader:
    """The file, open for reading bytes; DataError if it is missing, a directory or not readable."""
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file; check the path") from None
    except IsADirectoryError:
        raise DataError(
            f"{path}: is a directory; name a .jsonl, .json or .txt file, or a "
            "folder that save_to_disk of Hugging Face datasets wrote"
        ) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be opened: {error.strerror}") from None


def _read(path: Path, file: BufferedReader) -> bytes:
    try:
        return file.read(_BLOCK_BYTES)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def _lines(path: Path, file: BufferedReader) -> Iterator[bytes]:
    # Only b"\n" ends a line: U+2028 and others may stand inside a JSON string.
    try:
        yield from file
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def _empty(path: Path) -> DataError:
    return DataError(f"{path}: is empty; nothing to train on")


def _not_utf8(path: Path, first_line: int, error: UnicodeDecodeError) -> DataError:
    line = first_line + error.object[: error.start].count(b"\n")
    byte = error.object[error.start]
    return DataError(
        f"{path}, line {line}: is not UTF-8 (byte 0x{byte:02X}: {error.reason}); save it as UTF-8"
    )


def _record(where: str, line: str) -> Record:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: malformed JSON at column {error.colno}: {error.msg}; each line must be one "
            "whole JSON object"
        ) from None
    except (ValueError, RecursionError) as error:
        # Numbers of thousands of digits and nesting of thousands of levels.
        raise DataError(f"{where}: JSON that cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise DataError(
            f"{where}: found {_kind(value)}, not a JSON object; each line should be "
            f"{ACCEPTED_FORMS}"
        )
    return record_of(where, value)


def record_of(where: str, value: Mapping[str, Any]) -> Record:
    """The record in a decoded object; ``where`` names its place in complaints.

    Raises DataError unless it is of an accepted form.
    """
    forms = [form for form in _FORMS if value.keys() >= set(form)]
    if not forms:
        raise DataError(
            f"{where}: the keys ({_names(value)}) are those of no accepted form; each line should "
            f"be {ACCEPTED_FORMS}"
        )
    if len(forms) > 1:
        # Which of them the model should learn from is not for us to guess.
        found = " and also ".join(_names(form) for form in forms)
        raise DataError(
            f"{where}: has the keys of {len(forms)} forms, {found}; keep those of one of them"
        )
    if forms == [("text",)]:
        return TextRecord(where, _string(where, "text", value["text"]))
    if forms == [("messages",)]:
        return ChatRecord(where, _messages(where, value["messages"]))
    return CompletionRecord(
        where,
        _string(where, "prompt", value["prompt"]),
        _string(where, "completion", value["completion"]),
    )


def _messages(where: str, value: object) -> tuple[Message, ...]:
    if not isinstance(value, list):
        raise DataError(f"{where}: 'messages' is {_kind(value)}; it must be a list of messages")
    if not value:
        raise DataError(f"{where}: 'messages' is empty; a conversation needs at least one message")
    messages = []
    for index, item in enumerate(value):
        name = f"messages[{index}]"
        if not isinstance(item, dict):
            raise DataError(f"{where}: {name!r} is {_kind(item)}, not an object")
        if not item.keys() >= {"role", "content"}:
            raise DataError(
                f"{where}: {name!r} has the keys ({_names(item)}); a message needs 'role' and "
                "'content'"
            )
        messages.append(
            Message(
                _string(where, f"{name}.role", item["role"]),
                _string(where, f"{name}.content", item["content"]),
            )
        )
    return tuple(messages)


def _names(keys: Iterable[str]) -> str:
    return ", ".join(repr(key) for key in keys) or "none"


def _string(where: str, name: str, value: object) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: {name!r} is {_kind(value)}; it must be a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: {name!r} holds half a surrogate pair at character {error.start}, which is "
            "no text; repair the escape"
        ) from None
    return value


def _kind(value: object) -> str:
    """The JSON name of a decoded value's type, with its article."""
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string"}
    return names.get(type(value)) or ("a list" if isinstance(value, list) else "an object")
