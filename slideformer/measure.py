"""What a benchmark needs beside the engine: shapes, and batches of random tokens or of bytes.

Measures nothing itself; ``floors.py`` does, and ``tools/`` runs the comparisons.
"""

from __future__ import annotations

import torch
from numpy.typing import NDArray

from slideformer.models.data.batches import IGNORED_TARGET, Batch
from slideformer.models.shapes import SHAPE_NAMES, shape_config

__all__ = ["SHAPE_NAMES", "Batch", "batch_of", "random_batches", "shape_config"]


def batch_of(input_ids: torch.Tensor) -> Batch:
    """A batch without padding of int64 [B, S]: every token but the first of each row is learnt."""
    rows = len(input_ids)
    targets = torch.full_like(input_ids, IGNORED_TARGET)
    targets[:, :-1] = input_ids[:, 1:]
    return Batch(
        input_ids,
        targets,
        real_tokens=input_ids.numel(),
        target_tokens=rows * (input_ids.shape[1] - 1),
        rows=rows,
    )


def random_batches(vocab: int, rows: int, seq_len: int, count: int, seed: int = 0) -> list[Batch]:
    """``count`` batches of ``rows`` rows of uniformly random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return [
        batch_of(torch.randint(0, vocab, (rows, seq_len), generator=generator))
        for _ in range(count)
    ]


def array_batches(ids: NDArray) -> list[Batch]:
    """Batches of an integer array [count, B, S]."""
    return [batch_of(torch.from_numpy(each).to(torch.int64)) for each in ids]
