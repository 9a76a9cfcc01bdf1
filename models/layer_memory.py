"""The memory of a decoder layer's arithmetic: what it keeps for backward.

Sizes that the step compiler needs without the arithmetic are in ``graph/plan.py``, temporaries in
``workspace.py``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from slideformer.models.decoder import DecoderConfig
from slideformer.models.fused_attention import Saved


class Kept(NamedTuple):
    """Activations of one layer and micro-batch that forward leaves for backward to use and destroy.

    They spare backward every product but those of the gradients.
    """

    heads: Tensor
    """[B, S, H+2K, D]: queries and keys, rotated where no norm precedes that, and values."""
    middle: Tensor
    """[B·S, h]: the stream between attention and MLP."""
    gate_up: Tensor
    """[B·S, 2I]: the MLP's projections."""
    attention: Saved | None
    """What attention saves; None where it runs again."""


def kept_views(
    flat: Tensor, cfg: DecoderConfig, rows: int, seq_len: int, dtype: torch.dtype
) -> Kept:
    """Views of the bytes ``flat``, for ``rows`` sequences of ``seq_len`` tokens in ``dtype``.

    As many bytes as :func:`slideformer.graph.plan.kept_nbytes`; attention's part is there or not.
    """
    tokens, heads, dim = rows * seq_len, cfg.heads, cfg.head_dim
    position = 0

    def take(dtype: torch.dtype, *shape: int) -> Tensor:
        nonlocal position
        start, position = position, position + math.prod(shape) * dtype.itemsize
        return flat[start:position].view(dtype).view(shape)

    qkv = take(dtype, rows, seq_len, heads + 2 * cfg.kv_heads, dim)
    middle, gate_up = take(dtype, tokens, cfg.hidden), take(dtype, tokens, 2 * cfg.intermediate)
    saved = None
    if position < flat.numel():
        output = take(dtype, rows, seq_len, heads, dim)
        saved = Saved(output, take(torch.float32, rows, heads, seq_len))
    return Kept(qkv, middle, gate_up, saved)
