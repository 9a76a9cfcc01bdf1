"""Fixtures of the data tests: the byte tokenizer, and files written from records."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from slideformer.models.data.byte_tokenizer import build_byte_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """The byte tokenizer; shared, so tests do not change it."""
    return build_byte_tokenizer()


@pytest.fixture
def write_records(tmp_path: Path) -> Callable[..., Path]:
    """Writes the given records to a JSON-lines file, one on each line, and returns its path."""

    def write(*records: Any) -> Path:
        path = tmp_path / "train.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    return write


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, which nothing has made yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"
