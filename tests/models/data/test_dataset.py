"""The tokenised data set: rows, truncation, packing of plain text, statistics, refusals."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slideformer.graph.errors import ConfigError, DataError
from slideformer.models.data import tokenise
from slideformer.models.data.byte_tokenizer import (
    END_OF_TEXT_ID,
    PAD_ID,
    VOCAB_SIZE,
    build_byte_tokenizer,
)
from slideformer.models.data.dataset import TokenDataset

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Write = Callable[..., Path]


def rows_of(dataset: TokenDataset) -> list[tuple[list[int], list[bool]]]:
    rows = []
    for number in range(len(dataset)):
        ids, labels = dataset.read(np.array([number]))
        rows.append((ids.tolist(), labels.tolist()))
    return rows


def test_every_form_in_one_file(tokenizer: PreTrainedTokenizerFast, write_records: Write) -> None:
    path = write_records(
        {"text": "ab"},
        {"prompt": "p?", "completion": "c"},
        {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "v"}]},
    )
    dataset = TokenDataset.from_file(path, tokenizer, 64)
    eos = END_OF_TEXT_ID
    prompt = [*b"<|user|>\nu", eos, *b"\n<|assistant|>\n"]
    assert rows_of(dataset) == [
        ([*b"ab", eos], [False, True, True]),
        ([*b"p?c", eos], [False, False, True, True]),
        ([*prompt, *b"v", eos, *b"\n"], [False] * len(prompt) + [True, True, False]),
    ]
    assert len(dataset) == 3
    assert dataset.tokens == 7 + len(prompt) + 3
    assert dataset.target_tokens == 6
    assert (dataset.truncated_rows, dataset.truncated_tokens) == (0, 0)
    assert dataset.pad_id == PAD_ID


def test_held_compactly_and_read_only(
    tokenizer: PreTrainedTokenizerFast, write_records: Write
) -> None:
    dataset = TokenDataset.from_file(write_records({"text": "ab"}), tokenizer, 8)
    (part,) = dataset.parts
    assert part.tokens.ids.dtype == np.int32
    assert part.tokens.labels.dtype == np.bool_
    for held in (part.tokens.ids, part.tokens.labels):
        with pytest.raises(ValueError, match="read-only"):
            held[0] = 1


@given(lengths=st.lists(st.integers(0, 20), min_size=1, max_size=8), seq_len=st.integers(2, 24))
@settings(max_examples=40)
def test_truncation_is_counted(
    tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    seq_len: int,
) -> None:
    texts = ["x" * length for length in [*lengths, 1]]  # the last row surely has a target
    path = tmp_path_factory.mktemp("data") / "train.json"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    dataset = TokenDataset.from_file(path, tokenizer, seq_len)
    whole = [len(text) + 1 for text in texts]
    held = [min(length, seq_len) for length in whole]
    assert dataset.lengths.tolist() == held
    assert dataset.tokens == sum(held)
    assert dataset.truncated_rows == sum(length > seq_len for length in whole)
    assert dataset.truncated_tokens == sum(whole) - sum(held)
    assert dataset.target_tokens == sum(length - 1 for length in held)


def test_truncation_is_reported(
    tokenizer: PreTrainedTokenizerFast, write_records: Write, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_records({"text": "abcdef"}, {"text": "a"})
    with caplog.at_level(logging.INFO):
        TokenDataset.from_file(path, tokenizer, 4)
    assert "2 documents, 6 tokens, 4 of them targets" in caplog.text
    assert "1 of 2 documents are longer than 4 tokens; 3 tokens were cut off" in caplog.text


def test_row_whose_target_was_cut_off_still_counts(
    tokenizer: PreTrainedTokenizerFast, write_records: Write
) -> None:
    path = write_records({"prompt": "long one", "completion": "x"}, {"text": "ab"})
    dataset = TokenDataset.from_file(path, tokenizer, 4)
    assert rows_of(dataset)[0] == ([*b"long"], [False] * 4)
    assert len(dataset) == 2
    assert dataset.target_tokens == 2


@given(
    text=st.text(min_size=1).filter(lambda text: len(text.encode()) > 1 and text[0] != "\ufeff"),
    seq_len=st.integers(2, 9),
)
@settings(max_examples=50)
def test_plain_text_is_cut_into_rows_and_none_of_it_lost(
    tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
    text: str,
    seq_len: int,
) -> None:
    path = tmp_path_factory.mktemp("data") / "train.txt"
    path.write_bytes(text.encode())
    dataset = TokenDataset.from_file(path, tokenizer, seq_len)
    ids = [*text.encode(), END_OF_TEXT_ID]
    assert dataset.parts[0].tokens.ids.tolist() == ids
    rows = rows_of(dataset)
    assert [len(row) for row, _ in rows[:-1]] == [seq_len] * (len(rows) - 1)
    assert 1 <= len(rows[-1][0]) <= seq_len
    assert all(labels == [False] + [True] * (len(row) - 1) for row, labels in rows)
    assert dataset.target_tokens == len(ids) - len(rows)
    assert (dataset.truncated_rows, dataset.truncated_tokens) == (0, 0)


def test_grouping_does_not_show(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "train.jsonl"
    records: list[object] = [{"text": "x" * n} for n in range(20)]
    records += [{"prompt": "p" * n, "completion": "c"} for n in range(20)]
    path.write_text("\n".join(json.dumps(record) for record in records))
    plain = tmp_path / "train.txt"
    plain.write_text("one two three " * 200)
    large = [TokenDataset.from_file(each, tokenizer, 32) for each in (path, plain)]
    monkeypatch.setattr(tokenise, "GROUP_CHARS", 50)
    monkeypatch.setattr(tokenise, "PIECE_CHARS", 20)
    small = [TokenDataset.from_file(each, tokenizer, 32) for each in (path, plain)]
    assert [rows_of(dataset) for dataset in large] == [rows_of(dataset) for dataset in small]


def test_nothing_to_train_on(
    tokenizer: PreTrainedTokenizerFast, write_records: Write, tmp_path: Path
) -> None:
    path = write_records(
        {"messages": [{"role": "user", "content": "u"}]},
        {"prompt": "long one", "completion": "x"},
        {"text": ""},
    )
    with pytest.raises(
        DataError, match=r"not one target token in 3 documents.* 2 of them were cut off"
    ):
        TokenDataset.from_file(path, tokenizer, 4)
    bare = build_byte_tokenizer()
    bare.eos_token = None
    with pytest.raises(DataError, match="not one target token in 2 documents"):
        TokenDataset.from_file(write_records({"text": ""}, {"text": ""}), bare, 4)
    mark = tmp_path / "mark.txt"
    mark.write_bytes(b"\xef\xbb\xbf")
    with pytest.raises(DataError, match="not one target token in 0 documents"):
        TokenDataset.from_file(mark, bare, 4)


def test_faults_of_the_file_come_through(
    tokenizer: PreTrainedTokenizerFast, write_records: Write, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"train\.jsonl, line 2: 'messages' is empty"):
        TokenDataset.from_file(write_records({"text": "a"}, {"messages": []}), tokenizer, 8)
    bare = build_byte_tokenizer()
    bare.chat_template = None
    path = write_records({"text": "a"}, {"messages": [{"role": "user", "content": "x"}]})
    with pytest.raises(DataError, match=r"train\.jsonl, line 2: .* chat template"):
        TokenDataset.from_file(path, bare, 8)
    with pytest.raises(DataError, match="is a directory"):
        TokenDataset.from_file(tmp_path, tokenizer, 8)
    with pytest.raises(ConfigError, match=r"sequence length of 1 .* use 2 or more"):
        TokenDataset.from_file(path, tokenizer, 1)


def test_padding_token_falls_back(write_records: Write) -> None:
    path = write_records({"text": "ab"})
    bare = build_byte_tokenizer()
    bare.pad_token = None
    assert TokenDataset.from_file(path, bare, 8).pad_id == END_OF_TEXT_ID
    bare.eos_token = None
    assert TokenDataset.from_file(path, bare, 8).pad_id == 0


def test_vocabulary_check_names_the_largest_id(write_records: Write) -> None:
    bare = build_byte_tokenizer()
    path = write_records({"text": "az"})
    dataset = TokenDataset.from_file(path, bare, 8)
    dataset.check_vocabulary(VOCAB_SIZE)
    with pytest.raises(DataError, match=r"token id is 257 \(the pad token\).* has 257 entries"):
        dataset.check_vocabulary(VOCAB_SIZE - 1)
    bare.eos_token = bare.pad_token = None
    dataset = TokenDataset.from_file(path, bare, 8)
    dataset.check_vocabulary(ord("z") + 1)
    with pytest.raises(DataError, match=rf"train\.jsonl: .* token id is {ord('z')}, and"):
        dataset.check_vocabulary(ord("z"))
