"""The memory of a decoder layer's arithmetic: what it keeps for backward, and its temporaries.

Sizes that the step compiler needs without the arithmetic are in ``graph/plan.py``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from slideformer.models.decoder import DecoderConfig
from slideformer.models.fused_attention import Saved
from slideformer.models.softcapped import softcapped_workspace


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


def workspace_bytes(
    cfg: DecoderConfig,
    tokens: int,
    dtype_bytes: int,
    seq_len: int | None = None,
    *,
    packed: bool = False,
    tile: int | None = None,
) -> int:
    """Most bytes of temporaries that exist at once in :func:`forward` or :func:`backward` on a GPU.

    For a micro-batch of ``tokens`` tokens in sequences of ``seq_len`` (default: one sequence),
    computed in a dtype of ``dtype_bytes``; ``packed``: with several documents in a row; ``tile``:
    the tokens that the MLP takes at a time. Arguments are not temporaries, and the workspace that
    cuBLAS keeps for good is not counted.
    """
    seq_len = tokens if seq_len is None else seq_len
    tile = min(tile or tokens, tokens)
    h, i = cfg.hidden, cfg.intermediate
    q, kv = cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
    capped = cfg.softcap is not None
    # As in attention(): takes windows and shared heads.
    varlen = packed and dtype_bytes < 4 and not capped
    windowed = not varlen and any(w is not None and w < seq_len for w in cfg.windows)
    shared = not windowed and dtype_bytes < 4
    copies = 2 * q if cfg.heads > cfg.kv_heads and not shared else 0
    if packed and not varlen:  # documents one by one, put together again
        copies += 2 * q + 2 * kv
    forward_peak = max(
        tokens * (h + q + 2 * kv),  # normed input, heads
        tokens * (q + 2 * kv + copies + q),  # heads, keys and values by query head, attended
        tile * (h + 2 * i),  # normed middle, gate and up
        tile * (2 * i + i),  # gate and up, activation
    )
    held = (  # all through backward
        h  # normed input, for the gradient of the QKV matrix
        + (q + 2 * kv)  # heads
        + (q + kv if cfg.qk_norm else 0)  # queries and keys after their norms
        + copies  # saved by the attention
        + q  # attended
    )
    # Middle; of a tile the normed middle, gate and up, activation.
    mlp_peak = tokens * (held + h) + tile * (h + 2 * i + i)
    if cfg.output_norms:
        mlp_peak += tile * 2 * h  # the down projection before and after its norm
    routing = 0
    if cfg.experts is not None:
        k, e = cfg.experts.chosen, cfg.experts.count
        # Copied rows and what the experts make of them, or the activation before.
        forward_peak = max(forward_peak, tile * max(k * h + 2 * i, 2 * 2 * i, i + k * h))
        # Middle; of a tile the normed middle, rows, gate and up, gradients of outputs, activation
        # and its gradient.
        mlp_peak = tokens * (held + h) + tile * (h + k * h + 2 * i + k * h + 2 * i)
        routing = tile * (5 * 8 * k + 4 * 4 * k + 5 * 4 * e)  # places, weights; probabilities
    attention_peak = tokens * (
        held
        + q  # gradient of attended
        + (q + 2 * kv)  # gradients of queries, keys, values
        + 2 * q  # gradients of keys and values per query head, before they are summed
        + q * 4 // dtype_bytes  # gradient of the queries, summed in FP32
    )
    elements = max(forward_peak, mlp_peak, attention_peak)
    # FP32: what the RMSNorms of the stream and the heads keep for backward; of attention the
    # log-sum-exp and each row's product of output and gradient.
    rows = 2 + (cfg.heads + cfg.kv_heads if cfg.qk_norm else 0) + 2 * cfg.heads
    # A boolean mask becomes an additive one of the compute dtype inside attention.
    mask = seq_len * seq_len * dtype_bytes if windowed else 0
    scores = softcapped_workspace(cfg.heads, seq_len) if capped else 0
    rope = 2 * 4 * cfg.rotary_dim if packed else 0  # tables by token
    # PyTorch's allocator leaves up to 1 MiB unused at the end of a block; 12 are live at the peak.
    fixed = mask + scores + routing + 12 * 2**20
    return elements * dtype_bytes + tokens * (4 * rows + rope) + fixed


def allocator_slack(workspace: int) -> int:
    """Bytes that PyTorch's allocator may hold beyond the most temporaries that exist at once.

    Blocks of temporaries of one size do not all serve those of another. On an H100 that came to
    between 0.05 and 1.2 of the workspace, the less the smaller that was, and never to more than
    1.22 GiB (``docs/benchmarks.md``, reserved against allocated memory).
    """
    return min(9 * workspace // 10, 1250 << 20)
