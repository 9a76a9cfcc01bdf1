"""The byte tokenizer: ids are bytes, any text survives saving, loading, encoding and decoding."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from slideformer.models.data.byte_tokenizer import (
    END_OF_TEXT,
    END_OF_TEXT_ID,
    PAD,
    PAD_ID,
    VOCAB_SIZE,
    save_byte_tokenizer,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="module", params=[None, "llama", "qwen3", "mistral"])
def loaded(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> PreTrainedTokenizerFast:
    """The tokenizer out of its folder, alone there or beside a model's configuration."""
    from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

    folder: Path = tmp_path_factory.mktemp("tokenizer")
    save_byte_tokenizer(folder)
    if request.param:
        AutoConfig.for_model(request.param).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    return tokenizer


@given(text=st.text())
@example("every\x00byte\r\n\tcounts  ,  n't . \u0301e\u0301 字 \U0001f600 \u2028")
def test_any_text_round_trips_as_its_bytes(loaded: PreTrainedTokenizerFast, text: str) -> None:
    ids = loaded(text)["input_ids"]
    assert ids == list(text.encode())
    assert loaded.decode(ids) == text


def test_special_tokens(loaded: PreTrainedTokenizerFast) -> None:
    assert len(loaded) == VOCAB_SIZE
    assert sorted(loaded.get_vocab().values()) == list(range(VOCAB_SIZE))
    assert (loaded.eos_token, loaded.eos_token_id) == (END_OF_TEXT, END_OF_TEXT_ID)
    assert (loaded.pad_token, loaded.pad_token_id) == (PAD, PAD_ID)
    text = f"a{END_OF_TEXT}{PAD}b"
    assert loaded(text)["input_ids"] == [97, END_OF_TEXT_ID, PAD_ID, 98]
    assert loaded.decode([97, END_OF_TEXT_ID, PAD_ID, 98]) == text


def test_chat_template(loaded: PreTrainedTokenizerFast) -> None:
    chat = [{"role": "user", "content": "2+2"}, {"role": "assistant", "content": "4"}]
    prompt = f"<|user|>\n2+2{END_OF_TEXT}\n<|assistant|>\n"
    assert (
        loaded.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True) == prompt
    )
    assert loaded.apply_chat_template(chat, tokenize=False) == f"{prompt}4{END_OF_TEXT}\n"
