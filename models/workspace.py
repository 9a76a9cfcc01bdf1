"""Temporaries of the arithmetic on a GPU, in bytes; needs none of it, so that planning is quick."""

from __future__ import annotations

from slideformer.models.decoder import DecoderConfig

BLOCK_SCORES = 2**23
"""Scores of a block of queries, over all heads of one sequence; at least one query's."""


def workspace_bytes(
    cfg: DecoderConfig,
    tokens: int,
    dtype_bytes: int,
    seq_len: int | None = None,
    *,
    packed: bool = False,
    tile: int | None = None,
) -> int:
    """Most bytes of temporaries that exist at once in a layer's forward or backward.

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
    """Bytes that PyTorch's allocator may need beyond the most temporaries that exist at once.

    All of them lie in one block that a run takes beforehand (``runtime/cuda.py``). Of six models'
    steps on an H100, replayed, five needed nothing more and one 3 % for what lay between
    temporaries; a little is added for cuBLAS's own workspace.
    """
    return workspace // 32 + (64 << 20)


def head_workspace_bytes(vocab_chunk: int, tile: int, tokens: int, dtype_bytes: int) -> int:
    """Most bytes of temporaries that exist at once in ``head.py``; arguments are not temporaries.

    One tile of logits in the compute dtype (with up to 1 MiB that PyTorch's allocator leaves unused
    behind it), and seven vectors of at most FP32 over the tokens of the micro-batch: three of the
    sweep, the log-sum-exp, the losses, and what computing those takes.
    """
    return vocab_chunk * min(tile, tokens) * dtype_bytes + 2**20 + 7 * 4 * tokens


def softcapped_workspace(heads: int, seq_len: int) -> int:
    """Most bytes of temporaries beside inputs, outputs and their gradients in FP32."""
    scores = min(heads * seq_len * seq_len, max(BLOCK_SCORES, heads * seq_len))
    return 7 * 4 * scores
