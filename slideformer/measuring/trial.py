"""What a trial needs beside the engine: shapes, batches, and what a process holds on the GPU.

Measures nothing itself; ``floors.py`` does, and ``tools/`` runs the comparisons.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from slideformer.devices import find_device
from slideformer.kernels.reference import IGNORE_INDEX
from slideformer.models.data.batches import Batch, BatchStream
from slideformer.models.data.dataset import TokenDataset
from slideformer.models.shapes import SHAPE_NAMES, shape_config

__all__ = [
    "SHAPE_NAMES",
    "Batch",
    "array_batches",
    "batch_of",
    "log_normal_stream",
    "memory",
    "random_batches",
    "shape_config",
    "torch_device",
]


def batch_of(input_ids: torch.Tensor) -> Batch:
    """A batch without padding of int64 [B, S]: every token but the first of each row is learnt."""
    rows = len(input_ids)
    targets = torch.full_like(input_ids, IGNORE_INDEX)
    targets[:, :-1] = input_ids[:, 1:]
    return Batch(
        input_ids,
        targets,
        real_tokens=input_ids.numel(),
        target_tokens=rows * (input_ids.shape[1] - 1),
        rows=rows,
    )


def random_batches(vocab: int, rows: int, seq_len: int, count: int) -> list[Batch]:
    """``count`` batches of ``rows`` rows of uniformly random token ids."""
    generator = torch.Generator().manual_seed(0)
    return [
        batch_of(torch.randint(0, vocab, (rows, seq_len), generator=generator))
        for _ in range(count)
    ]


def log_normal_stream(
    vocab: int, seq_len: int, batch_size: int, documents: int, *, packing: bool
) -> BatchStream:
    """Batches of documents of random tokens, whose lengths vary as those of real texts do.

    Lengths are log-normal (sigma 1), clipped to 1 … ``seq_len``, and a third of it on average.
    """
    generator = np.random.default_rng(0)
    drawn = generator.lognormal(size=documents)
    low, high = 0.0, float(seq_len)
    for _ in range(50):  # the clipped mean grows with the scale
        scale = (low + high) / 2
        lengths = np.clip(drawn * scale, 1, seq_len).astype(np.int64)
        low, high = (scale, high) if lengths.mean() < seq_len / 3 else (low, scale)
    tokens = int(lengths.sum())
    dataset = TokenDataset.from_arrays(
        generator.integers(0, vocab, tokens, dtype=np.int32),
        np.append(0, np.cumsum(lengths)),
        np.ones(tokens, dtype=np.bool_),
        seq_len=seq_len,
    )
    return BatchStream(dataset, batch_size, seed=0, packing=packing)


def array_batches(ids: NDArray[np.int64]) -> list[Batch]:
    """Batches of an integer array [count, B, S]."""
    return [batch_of(torch.from_numpy(each).to(torch.int64)) for each in ids]


def torch_device(name: str) -> torch.device:
    """`find_device`, with a context where the device needs one; resets what `memory` reports."""
    device = find_device(name)
    if device.type == "cuda":
        torch.zeros(1, device=device)  # makes the context
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return device


def memory(device: torch.device) -> dict[str, Any]:
    """Bytes of GPU memory: this process's peaks, and what all processes together use now.

    ``retries`` counts how often an allocation succeeded only after cached memory was given back.
    Empty where there is no GPU.
    """
    if device.type != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info(device)
    return {
        "allocated_peak": torch.cuda.max_memory_allocated(device),
        "reserved_peak": torch.cuda.max_memory_reserved(device),
        "reserved": torch.cuda.memory_reserved(device),
        "used": total - free,
        "total": total,
        "retries": torch.cuda.memory_stats(device).get("num_alloc_retries", 0),
    }
