"""From records and plain text to token ids, and which of them are learnt.

Tokenises many records in one call, since the tokenizer spreads a call over the cores. Rows leave
here whole: truncation and padding are the dataset's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from slideformer.graph.errors import DataError
from slideformer.models.data.chat import ChatRenderer, RenderedChat
from slideformer.models.data.reading import ChatRecord, CompletionRecord, Record, TextRecord

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerFast

# A tokenizer needs about a hundred bytes of memory for each token while it works on a call.
GROUP_CHARS = 1 << 18
PIECE_CHARS = 1 << 15

# Between a letter or digit and a space every tokenizer in use starts a new token. Before a newline
# most do; that serves scripts that are written without spaces.
_LAST_WORD_END = re.compile(r"(?s).*[^\W_](?= )")
_LAST_LINE_END = re.compile(r"(?s).+(?=\n)")

T = TypeVar("T")


@dataclass(frozen=True)
class TokenRow:
    """A record as tokens: ``ids`` int32 [n]; ``labels`` bool [n], True where a token is learnt."""

    ids: NDArray[np.int32]
    labels: NDArray[np.bool_]


@dataclass(frozen=True)
class Piece:
    """A piece of a long text, and the character before it (empty if it is to stand alone)."""

    context: str
    text: str


def groups(items: Iterable[T], chars: Callable[[T], int]) -> Iterator[list[T]]:
    """Consecutive items in lists of about ``GROUP_CHARS`` characters, one item at least."""
    group: list[T] = []
    total = 0
    for item in items:
        group.append(item)
        total += 1 + chars(item)
        if total >= GROUP_CHARS:
            yield group
            group, total = [], 0
    if group:
        yield group


def record_chars(record: Record) -> int:
    """Roughly how many characters of a record there are to tokenise."""
    match record:
        case TextRecord(text=text):
            return len(text)
        case CompletionRecord(prompt=prompt, completion=completion):
            return 2 * len(prompt) + len(completion)
        case ChatRecord(messages=messages):
            return sum(len(message.content) for message in messages)


def cut_text(blocks: Iterable[str]) -> Iterator[Piece]:
    """Cuts a text into pieces of at most ``PIECE_CHARS``; their concatenation is the text.

    Cuts fall at the end of a word, or else of a line, if there is one, so that tokenising the
    pieces gives the tokens of the whole. Elsewhere a token may be split in two.
    """
    context = text = ""
    for block in blocks:
        text += block
        while len(text) > PIECE_CHARS:
            # The search ends one character late, which is as far as it looks ahead.
            window = (text, 0, PIECE_CHARS + 1)
            cut = _LAST_WORD_END.match(*window) or _LAST_LINE_END.match(*window)
            end = cut.end() if cut else PIECE_CHARS
            yield Piece(context, text[:end])
            # White space is no context: some tokenizers report a blank token as of no width.
            context = "" if text[end - 1].isspace() else text[end - 1]
            text = text[end:]
    if text:
        yield Piece(context, text)


class RowTokenizer:
    """Turns records into rows of tokens with a Hugging Face fast tokenizer.

    ``prefix`` are the ids it puts before every text (often a beginning-of-sequence token, often
    none), ``eos_id`` its end-of-sequence token if it has one. Raises DataError for a tokenizer
    without the Rust backend.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        if not tokenizer.is_fast:
            raise DataError(
                f"the tokenizer {type(tokenizer).__name__} is a slow one, which cannot tell which "
                "characters a token stands for; use a model folder with a tokenizer.json"
            )
        self._tokenizer = tokenizer
        self._chat = ChatRenderer(tokenizer)
        self.prefix = self._leading_special_tokens()
        self.eos_id: int | None = tokenizer.eos_token_id

    def identity(self) -> str:
        """All that decides the tokens of a text or a conversation."""
        try:
            template = self._tokenizer.get_chat_template()
        except ValueError:  # none, which only conversations need
            template = ""
        special_tokens = self._tokenizer.special_tokens_map
        return json.dumps([self._tokenizer.backend_tokenizer.to_str(), template, special_tokens])

    def rows(self, records: Sequence[Record]) -> Iterator[TokenRow]:
        """One row for each record, in order; ``groups`` keeps the memory of a call bounded.

        Raises DataError, naming the line, for a conversation that cannot be rendered.
        """
        chats: list[RenderedChat] = []
        texts: list[str] = []
        for record in records:
            match record:
                case TextRecord(text=text):
                    texts.append(text)
                case CompletionRecord(prompt=prompt, completion=completion):
                    texts += (prompt, prompt + completion)
                case ChatRecord():
                    chats.append(self._chat.render(record))
                    texts.append(chats[-1].text)
        encoded = self._encode(texts, offsets=bool(chats))
        ids: list[list[int]] = encoded["input_ids"]
        at, chat = 0, iter(chats)
        for record in records:
            match record:
                case TextRecord():
                    yield self._row([], ids[at])
                    at += 1
                case CompletionRecord(completion=completion):
                    yield self._completion_row(ids[at], ids[at + 1], completion)
                    at += 2
                case ChatRecord():
                    offsets = encoded["offset_mapping"][at]
                    yield TokenRow(_int32(ids[at]), _inside(offsets, next(chat).spans))
                    at += 1

    def document(self, pieces: Iterable[Piece]) -> Iterator[NDArray[np.int32]]:
        """The tokens of one long text, int32, part by part: prefix, text, end of sequence."""
        yield _int32(self.prefix)
        for group in groups(pieces, lambda piece: len(piece.text)):
            encoded = self._encode([piece.context + piece.text for piece in group])
            for index, piece in enumerate(group):
                skip = _context_tokens(encoded, index, len(piece.context))
                if skip is None:
                    yield _int32(self._encode([piece.text])["input_ids"][0])
                else:
                    yield _int32(encoded["input_ids"][index][skip:])
        if self.eos_id is not None:
            yield _int32([self.eos_id])

    def _row(self, prompt: list[int], learnt: list[int]) -> TokenRow:
        """Prefix, prompt, what is learnt, and the end of sequence unless the text has it."""
        if self.eos_id is not None and learnt[-1:] != [self.eos_id]:
            learnt = [*learnt, self.eos_id]
        ids = _int32([*self.prefix, *prompt, *learnt])
        labels = np.zeros(len(ids), dtype=np.bool_)
        labels[len(ids) - len(learnt) :] = True
        return TokenRow(ids, labels)

    def _completion_row(self, prompt: list[int], both: list[int], completion: str) -> TokenRow:
        # The prompt's tokens have to be those of the prompt alone, which is all that the model sees
        # when it is used. Where a token would straddle the two, the completion is tokenised apart.
        if both[: len(prompt)] == prompt:
            return self._row(prompt, both[len(prompt) :])
        return self._row(prompt, self._encode([completion])["input_ids"][0])

    def _encode(self, texts: list[str], *, offsets: bool = False) -> BatchEncoding:
        encoded: BatchEncoding = self._tokenizer(
            texts,
            add_special_tokens=False,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=offsets,
            verbose=False,  # no advice about the model's longest input
        )
        return encoded

    def _leading_special_tokens(self) -> list[int]:
        probe = self._tokenizer("a", return_special_tokens_mask=True)
        pairs = zip(probe["input_ids"], probe["special_tokens_mask"], strict=True)
        return [token for token, _ in takewhile(lambda pair: pair[1] == 1, pairs)]


def _context_tokens(encoded: BatchEncoding, index: int, context: int) -> int | None:
    """How many of a text's first tokens cover its ``context`` characters; None if one straddles."""
    if not context:
        return 0
    for token in range(len(encoded["input_ids"][index])):
        span = encoded.token_to_chars(index, token)
        if span is not None and span.end > context:
            return token if span.start >= context else None
    return len(encoded["input_ids"][index])


def _inside(
    offsets: list[tuple[int, int]], spans: tuple[tuple[int, int], ...]
) -> NDArray[np.bool_]:
    """True for each token that ends inside one of the spans.

    A token's end decides because its start is not reliable: byte-level tokenizers may leave leading
    white space out of it.
    """
    ends = np.array([end for _, end in offsets], dtype=np.int64)
    labels = np.zeros(len(ends), dtype=np.bool_)
    for start, end in spans:
        labels |= (ends > start) & (ends <= end)
    return labels


def _int32(ids: list[int]) -> NDArray[np.int32]:
    return np.array(ids, dtype=np.int32)
