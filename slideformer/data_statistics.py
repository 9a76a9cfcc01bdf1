"""Figures of a data set: how long its documents are, what is cut off, what is padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from slideformer.models.data.dataset import TokenDataset
from slideformer.models.data.packing import pack, padding_share
from slideformer.models.tokenizers import load_tokenizer

PERCENTILES = (0, 10, 50, 90, 99, 100)


@dataclass(frozen=True, slots=True)
class DataStatistics:
    """Figures of documents at a sequence length, each source's counted once.

    ``lengths`` are those of the whole documents, in tokens, at `PERCENTILES`; ``mean_length`` is
    their mean. ``tokens`` and ``target_tokens`` are held, ``truncated_tokens`` were cut off
    ``truncated_documents``. ``padded_rows`` and ``packed_rows`` are the rows that the documents
    need one to a row, and packed.
    """

    documents: int
    tokens: int
    target_tokens: int
    truncated_documents: int
    truncated_tokens: int
    lengths: tuple[int, ...]
    mean_length: float
    seq_len: int
    padded_rows: int
    packed_rows: int

    @property
    def padding_share(self) -> float:
        """Share of padding in rows of one document each."""
        return padding_share(self.tokens, self.padded_rows, self.seq_len)

    @property
    def packed_padding_share(self) -> float:
        """Share of padding in packed rows."""
        return padding_share(self.tokens, self.packed_rows, self.seq_len)


def statistics_of(dataset: TokenDataset) -> DataStatistics:
    """The figures of a data set; packing takes about a second for a million documents."""
    whole = np.concatenate([part.lengths + part.cut for part in dataset.parts])
    at = np.percentile(whole, PERCENTILES, method="nearest") if len(whole) else []
    return DataStatistics(
        documents=len(dataset),
        tokens=dataset.tokens,
        target_tokens=dataset.target_tokens,
        truncated_documents=dataset.truncated_rows,
        truncated_tokens=dataset.truncated_tokens,
        lengths=tuple(int(length) for length in at),
        mean_length=float(whole.mean()) if len(whole) else 0.0,
        seq_len=dataset.seq_len,
        padded_rows=len(dataset),
        packed_rows=sum(len(pack(part.lengths, dataset.seq_len)) for part in dataset.parts),
    )


def statistics_of_files(files: Sequence[Path], model: Path, seq_len: int) -> list[DataStatistics]:
    """The figures of each file, tokenised with the tokenizer of a model folder.

    Raises as `TokenDataset.from_sources` and `load_tokenizer` do.
    """
    tokenizer = load_tokenizer(model)
    return [statistics_of(TokenDataset.from_file(path, tokenizer, seq_len)) for path in files]
