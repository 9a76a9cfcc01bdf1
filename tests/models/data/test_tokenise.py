"""From records to tokens: masks token by token, and long texts cut without a seam."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from slideformer.graph.errors import DataError
from slideformer.models.data import tokenise
from slideformer.models.data.byte_tokenizer import END_OF_TEXT_ID, build_byte_tokenizer
from slideformer.models.data.reading import (
    ChatRecord,
    CompletionRecord,
    Message,
    Record,
    TextRecord,
)
from slideformer.models.data.tokenise import RowTokenizer, TokenRow, cut_text, groups

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CHAT = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
CORPUS = [
    "the quick brown fox jumps over the lazy dog, and the dog sleeps on.\n\n",
    "def quick(fox):\n    return 12345 + fox  # the answer: yes\n",
    "<user>the question</s><assistant>the answer: yes</s>",
] * 8


def byte_level() -> PreTrainedTokenizerFast:
    """Trained byte-level BPE as of GPT-2, which leaves white space out of a token's offsets."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["</s>", "<user>", "<assistant>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend, eos_token="</s>"
    )


def sentence_piece() -> PreTrainedTokenizerFast:
    """BPE as of Llama 2: a space before every text, byte fallback, <s> in front and </s> behind."""
    from tokenizers import (
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<s>", "</s>", "<user>", "<assistant>"]
        + [f"<0x{byte:02X}>" for byte in range(256)],
        show_progress=False,
    )
    backend.train_from_iterator([line for text in CORPUS for line in text.split("\n")], trainer)
    # Splitting into words served the training; spaces are replaced in the text from here on.
    backend.pre_tokenizer = None
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture(scope="module", params=[build_byte_tokenizer, byte_level, sentence_piece])
def any_tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    tokenizer: PreTrainedTokenizerFast = request.param()
    return tokenizer


def row_of(tokenizer: PreTrainedTokenizerFast, record: Record) -> TokenRow:
    (row,) = RowTokenizer(tokenizer).rows([record])
    assert row.ids.dtype == np.int32
    assert row.labels.dtype == np.bool_
    return row


def plain_ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def test_text_is_learnt_to_its_end(tokenizer: PreTrainedTokenizerFast) -> None:
    row = row_of(tokenizer, TextRecord("", "ab ö"))
    assert row.ids.tolist() == [*b"ab \xc3\xb6", END_OF_TEXT_ID]
    assert row.labels.tolist() == [True] * 6


def test_completion_alone_is_learnt(tokenizer: PreTrainedTokenizerFast) -> None:
    row = row_of(tokenizer, CompletionRecord("", "2+2=", "4!"))
    assert row.ids.tolist() == [*b"2+2=4!", END_OF_TEXT_ID]
    assert row.labels.tolist() == [False] * 4 + [True] * 3


def test_assistant_alone_is_learnt_in_every_turn(tokenizer: PreTrainedTokenizerFast) -> None:
    turns = (("user", "a"), ("assistant", "ö"), ("user", "b"), ("assistant", "c"))
    messages = tuple(Message(role, content) for role, content in turns)
    row = row_of(tokenizer, ChatRecord("", messages))
    expected = [
        (b"<|user|>\na", False), (None, False), (b"\n<|assistant|>\n", False),
        ("ö".encode(), True), (None, True), (b"\n<|user|>\nb", False), (None, False),
        (b"\n<|assistant|>\n", False), (b"c", True), (None, True), (b"\n", False),
    ]  # fmt: skip
    ids = [token for part, _ in expected for token in (part or [END_OF_TEXT_ID])]
    labels = [learnt for part, learnt in expected for _ in (part or [END_OF_TEXT_ID])]
    assert row.ids.tolist() == ids
    assert row.labels.tolist() == labels


def test_mixed_records_keep_their_order(tokenizer: PreTrainedTokenizerFast) -> None:
    records: list[Record] = [
        ChatRecord("", (Message("assistant", "x"),)),
        CompletionRecord("", "p", "c"),
        TextRecord("", ""),
        ChatRecord("", (Message("user", "y"),)),
        TextRecord("", "t"),
    ]
    together = list(RowTokenizer(tokenizer).rows(records))
    assert len(together) == len(records)
    for row, record in zip(together, records, strict=True):
        alone = row_of(tokenizer, record)
        assert row.ids.tolist() == alone.ids.tolist()
        assert row.labels.tolist() == alone.labels.tolist()


def test_end_of_sequence_is_not_doubled(any_tokenizer: PreTrainedTokenizerFast) -> None:
    eos = any_tokenizer.eos_token
    for record in (TextRecord("", f"the{eos}"), CompletionRecord("", "the", f" dog{eos}")):
        ids = row_of(any_tokenizer, record).ids.tolist()
        assert ids.count(any_tokenizer.eos_token_id) == 1
        assert ids[-1] == any_tokenizer.eos_token_id


def test_tokenizer_without_end_of_sequence() -> None:
    tokenizer = build_byte_tokenizer()
    tokenizer.eos_token = None
    assert row_of(tokenizer, TextRecord("", "ab")).ids.tolist() == [*b"ab"]
    row = row_of(tokenizer, CompletionRecord("", "a", ""))
    assert (row.ids.tolist(), row.labels.tolist()) == ([*b"a"], [False])
    parts = RowTokenizer(tokenizer).document(cut_text(["ab"]))
    assert np.concatenate(list(parts)).tolist() == [*b"ab"]


def test_beginning_of_sequence_is_put_before_and_not_learnt_in_a_prompt() -> None:
    tokenizer = sentence_piece()
    the, dog = plain_ids(tokenizer, "the"), plain_ids(tokenizer, "dog")
    assert row_of(tokenizer, TextRecord("", "the")).ids.tolist() == [0, *the, 1]
    row = row_of(tokenizer, CompletionRecord("", "the", " dog"))
    assert row.ids.tolist() == [0, *the, *dog, 1]
    assert row.labels.tolist() == [False] * (1 + len(the)) + [True] * (len(dog) + 1)


def test_prompt_is_tokenised_as_without_its_completion() -> None:
    tokenizer = byte_level()
    # " yes" is one token, and two line ends in a row are one only where no word follows.
    for prompt, completion in (("answer: ", "yes"), ("answer:\n\n", "yes"), ("answer: ye", "s")):
        head, tail = plain_ids(tokenizer, prompt), plain_ids(tokenizer, completion)
        assert plain_ids(tokenizer, prompt + completion) != head + tail
        row = row_of(tokenizer, CompletionRecord("", prompt, completion))
        assert row.ids.tolist() == [*head, *tail, tokenizer.eos_token_id]
        assert row.labels.tolist() == [False] * len(head) + [True] * (len(tail) + 1)


@given(
    turns=st.lists(
        st.tuples(
            st.sampled_from(["user", "assistant"]),
            st.text("the quick\n é字", max_size=12).filter(lambda text: text == text.strip()),
        ),
        min_size=1,
        max_size=5,
    )
)
@settings(max_examples=40)
def test_learnt_tokens_of_a_chat_spell_the_assistants_words(
    any_tokenizer: PreTrainedTokenizerFast, turns: list[tuple[str, str]]
) -> None:
    any_tokenizer.chat_template = CHAT
    messages = tuple(Message(role, content) for role, content in turns)
    row = row_of(any_tokenizer, ChatRecord("", messages))
    assert row.ids.tolist() == plain_ids(
        any_tokenizer, "".join(f"<{role}>{content}</s>" for role, content in turns)
    )
    runs = np.flatnonzero(np.diff(row.labels.astype(np.int8), prepend=0, append=0)).reshape(-1, 2)
    spoken = [str(any_tokenizer.decode(row.ids[start:end])).strip() for start, end in runs]
    assert spoken == [f"{content}</s>" for role, content in turns if role == "assistant"]


@pytest.mark.parametrize(
    "text", ["".join(CORPUS), "the quick brown fox " * 30, "狐狸\n狗。\n" * 30]
)
def test_pieces_give_the_tokens_of_the_whole(
    any_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr(tokenise, "PIECE_CHARS", 40)
    monkeypatch.setattr(tokenise, "GROUP_CHARS", 100)
    row_tokenizer = RowTokenizer(any_tokenizer)
    ids = np.concatenate(list(row_tokenizer.document(cut_text([text])))).tolist()
    whole = plain_ids(any_tokenizer, text)
    assert ids == [*row_tokenizer.prefix, *whole, any_tokenizer.eos_token_id]


@given(text=st.text(), block=st.integers(1, 30))
@example(text="quick" * 9, block=9)
@example(text=" " * 30, block=9)
@example(text="the" + " \n" * 20, block=9)
@settings(max_examples=60)
def test_no_text_is_lost_wherever_it_is_cut(
    any_tokenizer: PreTrainedTokenizerFast, text: str, block: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenise, "PIECE_CHARS", 8)
        blocks = [text[at : at + block] for at in range(0, len(text), block)]
        pieces = list(cut_text(blocks))
        assert "".join(piece.text for piece in pieces) == text
        assert all(len(piece.text) <= 8 for piece in pieces)
        row_tokenizer = RowTokenizer(any_tokenizer)
        if row_tokenizer.prefix:
            return  # a tokenizer that puts a space before a text does not spell it exactly
        ids = np.concatenate(list(row_tokenizer.document(pieces)))
        assert any_tokenizer.decode(ids[:-1]) == text


def test_groups_bound_what_one_call_tokenises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenise, "GROUP_CHARS", 10)
    assert list(groups(["a" * 4, "b" * 4, "c" * 99, "d"], len)) == [
        ["a" * 4, "b" * 4],
        ["c" * 99],
        ["d"],
    ]
    assert max(map(len, groups([""] * 100, len))) <= 10


def test_slow_tokenizer_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    class Slow:
        is_fast = False

    with pytest.raises(DataError, match=r"Slow is a slow one.*tokenizer\.json"):
        RowTokenizer(Slow())  # type: ignore[arg-type]
