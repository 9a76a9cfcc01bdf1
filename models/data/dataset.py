"""A tokenised training file in memory: five bytes a token, rows of at most the sequence length.

Cuts and truncates rows and counts what was lost. Batches, shuffling and tensors are made elsewhere.
"""

from __future__ import annotations

import logging
from array import array
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from slideformer.graph.errors import ConfigError, DataError
from slideformer.models.data.reading import is_plain_text, read_records, read_text
from slideformer.models.data.tokenise import RowTokenizer, cut_text, groups, record_chars

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)


class TokenDataset:
    """Rows of token ids with their loss mask, one after another in flat read-only arrays.

    ids: int32 [tokens]; row ``r`` is ``ids[offsets[r]:offsets[r + 1]]``. offsets: int64 [rows + 1].
    labels: bool [tokens], True where a token is learnt. A row's first token never is, since nothing
    precedes it. ``tokens`` counts what is held, ``target_tokens`` what is learnt;
    ``truncated_rows`` and ``truncated_tokens`` count what did not fit ``seq_len`` and is not held.
    """

    def __init__(
        self,
        ids: NDArray[np.int32],
        offsets: NDArray[np.int64],
        labels: NDArray[np.bool_],
        *,
        seq_len: int,
        pad_id: int = 0,
        truncated_rows: int = 0,
        truncated_tokens: int = 0,
        source: str = "data set",
    ) -> None:
        lengths = np.diff(offsets)
        assert len(ids) == len(labels) == offsets[-1]
        assert not len(lengths) or (lengths.min() >= 0 and lengths.max() <= seq_len)
        labels = labels.copy()
        labels[offsets[:-1][lengths > 0]] = False
        self.ids, self.offsets, self.labels = ids.view(), offsets.view(), labels
        for held in (self.ids, self.offsets, self.labels):
            held.flags.writeable = False
        self.seq_len = seq_len
        self.pad_id = pad_id
        self.truncated_rows = truncated_rows
        self.truncated_tokens = truncated_tokens
        self.source = source
        self.tokens = len(ids)
        self.target_tokens = int(np.count_nonzero(labels))

    def __len__(self) -> int:
        """The number of rows, those without a target included."""
        return len(self.offsets) - 1

    @classmethod
    def from_file(
        cls, path: Path, tokenizer: PreTrainedTokenizerFast, seq_len: int
    ) -> TokenDataset:
        """Reads and tokenises a ``.jsonl``, ``.json`` (one object on each line) or ``.txt`` file.

        A record becomes one row, cut off at ``seq_len`` tokens; a plain text is cut into
        consecutive rows of ``seq_len`` tokens, none of them lost. The file is streamed. Raises
        DataError, with the line where there is one, for whatever is wrong with the file and for a
        file without a single target; ConfigError for a ``seq_len`` below two.
        """
        if seq_len < 2:
            raise ConfigError(
                f"a sequence length of {seq_len} leaves nothing to predict; use 2 or more"
            )
        builder = _Builder(seq_len)
        row_tokenizer = RowTokenizer(tokenizer)
        if is_plain_text(path):
            for part in row_tokenizer.document(cut_text(read_text(path))):
                builder.extend(part)
            builder.cut_rows()
        else:
            for group in groups(read_records(path), record_chars):
                for row in row_tokenizer.rows(group):
                    builder.add_row(row.ids, row.labels)
        dataset = builder.build(_pad_id(tokenizer), str(path))
        if not dataset.target_tokens:
            raise DataError(
                f"{path}: not one target token in {len(dataset)} rows; with sequence length "
                f"{seq_len} {dataset.truncated_rows} rows were cut off, so try a longer one, and "
                "check that completions or assistant turns are not empty"
            )
        logger.info(
            "%s: %d rows, %d tokens, %d of them targets", path, len(dataset), dataset.tokens,
            dataset.target_tokens,
        )  # fmt: skip
        if dataset.truncated_rows:
            logger.warning(
                "%s: %d of %d rows are longer than %d tokens; %d tokens were cut off", path,
                dataset.truncated_rows, len(dataset), seq_len, dataset.truncated_tokens,
            )  # fmt: skip
        return dataset

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises DataError if a token of the data, or the pad token, is not in the vocabulary.

        What counts are the ids in use: some models ship a tokenizer that knows more tokens than
        their embedding has rows.
        """
        largest = max(int(self.ids.max(initial=0)), self.pad_id)
        if largest >= vocab_size:
            pad = " (the pad token)" if largest == self.pad_id else ""
            raise DataError(
                f"{self.source}: the largest token id is {largest}{pad}, and the model's "
                f"vocabulary has {vocab_size} entries; use the tokenizer that came with the model"
            )


class _Builder:
    """Grows a data set; byte arrays grow in place, so the tokens are never held twice."""

    def __init__(self, seq_len: int) -> None:
        self._seq_len = seq_len
        self._ids = bytearray()
        self._labels = bytearray()
        self._lengths = array("q")
        self._truncated_rows = 0
        self._truncated_tokens = 0

    def add_row(self, ids: NDArray[np.int32], labels: NDArray[np.bool_]) -> None:
        surplus = len(ids) - self._seq_len
        if surplus > 0:
            self._truncated_rows += 1
            self._truncated_tokens += surplus
        self._ids += ids[: self._seq_len].tobytes()
        self._labels += labels[: self._seq_len].tobytes()
        self._lengths.append(min(len(ids), self._seq_len))

    def extend(self, ids: NDArray[np.int32]) -> None:
        """More of one long text, all of it learnt; ``cut_rows`` makes rows of it at the end."""
        self._ids += ids.tobytes()
        self._labels += b"\x01" * len(ids)

    def cut_rows(self) -> None:
        whole, rest = divmod(len(self._labels), self._seq_len)
        self._lengths.extend([self._seq_len] * whole + ([rest] if rest else []))

    def build(self, pad_id: int, source: str) -> TokenDataset:
        offsets = np.zeros(len(self._lengths) + 1, dtype=np.int64)
        np.cumsum(np.frombuffer(self._lengths, dtype=np.int64), out=offsets[1:])
        return TokenDataset(
            np.frombuffer(self._ids, dtype=np.int32),
            offsets,
            np.frombuffer(self._labels, dtype=np.bool_),
            seq_len=self._seq_len,
            pad_id=pad_id,
            truncated_rows=self._truncated_rows,
            truncated_tokens=self._truncated_tokens,
            source=source,
        )


def _pad_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """What fills the end of a short row; nothing is learnt there, so any token would do."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    return 0
