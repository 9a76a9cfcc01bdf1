"""A tokenised data set: documents of one or several files, of at most the sequence length.

Counts what was cut off, and sets documents aside for validation. Batches, shuffling and tensors are
made elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from slideformer.graph.errors import ConfigError, DataError
from slideformer.models.data.cache import tokenised
from slideformer.models.data.corpus import open_corpus
from slideformer.models.data.order import split_off
from slideformer.models.data.parts import Part, part_from, part_of
from slideformer.models.data.sources import Source
from slideformer.models.data.tokenise import RowTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)


class TokenDataset:
    """The documents of several parts, numbered through.

    lengths: int64 [documents]. bounds: int64 [parts + 1]; the documents of part p are those from
    ``bounds[p]`` to below ``bounds[p + 1]``. ``tokens`` counts what is held, ``target_tokens`` what
    is learnt; ``truncated_rows`` and ``truncated_tokens`` count the documents that did not fit
    ``seq_len``, and what was cut off them. ``digest`` tells these parts and weights from others.
    """

    def __init__(self, parts: Sequence[Part], *, seq_len: int, pad_id: int = 0) -> None:
        self.parts = tuple(parts)
        self.seq_len = seq_len
        self.pad_id = pad_id
        self.source = ", ".join(dict.fromkeys(part.source for part in parts))
        self.lengths = np.concatenate([part.lengths for part in parts])
        assert self.lengths.max(initial=0) <= seq_len
        self.bounds = np.cumsum([0, *map(len, parts)])
        self.tokens = int(self.lengths.sum())
        self.target_tokens = sum(int(part.targets.sum()) for part in parts)
        self.truncated_rows = sum(int(np.count_nonzero(part.cut)) for part in parts)
        contents = [[part.tokens.digest, part.weight] for part in parts]
        digest = hashlib.blake2b(json.dumps(contents).encode(), digest_size=8).digest()
        self.digest = int.from_bytes(digest, "little")
        self.truncated_tokens = sum(int(part.cut.sum()) for part in parts)

    def __len__(self) -> int:
        """The number of documents, those without a target included."""
        return len(self.lengths)

    @classmethod
    def from_arrays(
        cls,
        ids: NDArray[np.int32],
        offsets: NDArray[np.int64],
        labels: NDArray[np.bool_],
        *,
        seq_len: int,
        pad_id: int = 0,
    ) -> TokenDataset:
        """Documents ``ids[offsets[d]:offsets[d + 1]]``; ``labels`` say which tokens are learnt."""
        part = part_of(ids, offsets, labels, seq_len=seq_len)
        return cls([part], seq_len=seq_len, pad_id=pad_id)

    @classmethod
    def from_file(
        cls, path: Path, tokenizer: PreTrainedTokenizerFast, seq_len: int
    ) -> TokenDataset:
        """The documents of one file; see `from_sources`."""
        return cls.from_sources([Source(path)], tokenizer, seq_len)

    @classmethod
    def from_sources(
        cls, sources: Sequence[Source], tokenizer: PreTrainedTokenizerFast, seq_len: int
    ) -> TokenDataset:
        """Reads and tokenises files, ``.jsonl``, ``.json`` (one object on each line) or ``.txt``.

        Data sets of Hugging Face, in folders or on the Hub, are read as records, too.

        A record becomes one document, cut off at ``seq_len`` tokens; a plain text is cut into
        consecutive documents of ``seq_len`` tokens, none of them lost. The tokens are kept on disk
        and mapped. Raises DataError, with the line where there is one, for whatever is wrong with a
        file and for one without a single target; ConfigError for a ``seq_len`` below two.
        """
        if not 2 <= seq_len < 1 << 31:
            raise ConfigError(
                f"a sequence length of {seq_len} is out of range; use 2 or more, so that there is "
                "something to predict, and less than 2^31"
            )
        rows = RowTokenizer(tokenizer)
        parts = [_read(source, rows, seq_len) for source in sources]
        return cls(parts, seq_len=seq_len, pad_id=_pad_id(tokenizer))

    def read(self, documents: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """The documents of these numbers, one after another: ids int32, and a bool for each.

        It is True where a token is learnt, which a document's first never is.
        """
        if len(self.parts) == 1:
            return self.parts[0].read(documents)
        lengths = self.lengths[documents]
        ids = np.empty(int(lengths.sum()), dtype=np.int32)
        labels = np.empty(len(ids), dtype=np.bool_)
        owner = np.searchsorted(self.bounds, documents, side="right") - 1
        for number in np.unique(owner):
            mine = owner == number
            place = np.repeat(mine, lengths)
            part = self.parts[number]
            ids[place], labels[place] = part.read(documents[mine] - self.bounds[number])
        return ids, labels

    def split(self, share: float, seed: int) -> tuple[TokenDataset, TokenDataset]:
        """The documents to train on, and ``share`` of them, drawn by ``seed``, to validate with.

        At least one is set aside; each of these counts once, whatever its source's weight. Raises
        DataError where nothing remains to train on, or nothing to learn in one of the two.
        """
        aside = split_off(len(self), share, seed)
        parts = {
            "training": self._select(~aside),
            "validation": [replace(part, weight=1.0) for part in self._select(aside)],
        }
        for name, chosen in parts.items():
            if not any(part.targets.any() for part in chosen):
                raise DataError(
                    f"{self.source}: a validation split of {share:g} leaves no target token for "
                    f"{name}, out of {len(self)} documents; choose another share, or name a file "
                    "as validation"
                )
        train, validation = (
            TokenDataset(chosen, seq_len=self.seq_len, pad_id=self.pad_id)
            for chosen in parts.values()
        )
        return train, validation

    def _select(self, chosen: NDArray[np.bool_]) -> list[Part]:
        parts = [
            part.select(chosen[begin:end])
            for part, (begin, end) in zip(self.parts, pairwise(self.bounds), strict=True)
        ]
        return [part for part in parts if len(part)]

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises DataError if a token of the data, or the pad token, is not in the vocabulary.

        What counts are the ids in use: some models ship a tokenizer that knows more tokens than
        their embedding has rows.
        """
        for part in self.parts:
            largest = max(part.tokens.largest_id, self.pad_id)
            if largest >= vocab_size:
                pad = " (the pad token)" if largest == self.pad_id else ""
                raise DataError(
                    f"{part.source}: the largest token id is {largest}{pad}, and the model's "
                    f"vocabulary has {vocab_size} entries; use the tokenizer that came with the "
                    "model"
                )


def load_datasets(
    data: Sequence[Source],
    validation: Sequence[Source],
    validation_split: float | None,
    tokenizer: PreTrainedTokenizerFast,
    *,
    seq_len: int,
    seed: int,
) -> tuple[TokenDataset, TokenDataset | None]:
    """What to train on, and what to validate with: files of their own, a split, or nothing.

    Depends on the files, the settings and ``seed`` alone. Raises as `TokenDataset.from_sources` and
    `TokenDataset.split` do.
    """
    dataset = TokenDataset.from_sources(data, tokenizer, seq_len)
    if validation:
        return dataset, TokenDataset.from_sources(validation, tokenizer, seq_len)
    if validation_split is None:
        return dataset, None
    train, aside = dataset.split(validation_split, seed)
    logger.info(
        "set %d of %d documents aside for validation, %d tokens", len(aside), len(dataset),
        aside.tokens,
    )  # fmt: skip
    return train, aside


def _read(source: Source, rows: RowTokenizer, seq_len: int) -> Part:
    corpus = open_corpus(source)
    part = part_from(
        tokenised(corpus, rows),
        seq_len=seq_len,
        text=corpus.text is not None,
        source=corpus.name,
        weight=source.weight,
    )
    _report(part, seq_len)
    return part


def _report(part: Part, seq_len: int) -> None:
    """Log what a part holds and what was cut off; raises DataError if nothing is learnt."""
    targets = int(part.targets.sum())
    truncated = int(np.count_nonzero(part.cut))
    if not targets:
        raise DataError(
            f"{part.source}: not one target token in {len(part)} documents; with sequence length "
            f"{seq_len} {truncated} of them were cut off, so try a longer one, and check that "
            "completions or assistant turns are not empty"
        )
    logger.info(
        "%s: %d documents, %d tokens, %d of them targets", part.source, len(part),
        part.lengths.sum(), targets,
    )  # fmt: skip
    if truncated:
        logger.warning(
            "%s: %d of %d documents are longer than %d tokens; %d tokens were cut off",
            part.source, truncated, len(part), seq_len, part.cut.sum(),
        )  # fmt: skip


def _pad_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """What fills the end of a short row; nothing is learnt there, so any token would do."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    return 0
