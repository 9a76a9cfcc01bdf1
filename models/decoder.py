"""What a decoder computes, as plain data: families are turned into it, the arithmetic reads it.

All families share one decoder layer: pre-norm attention with rotary positions and grouped-query
heads, then a gated MLP or experts, each with a residual connection. RMSNorm normalises in FP32,
rounds to the compute dtype and then multiplies by its weight, unless its weights are ``centred``.
"""

from __future__ import annotations

from dataclasses import dataclass

from slideformer.kernels.activations import Activation


@dataclass(frozen=True, slots=True)
class Experts:
    """The experts of a layer: ``count`` gated MLPs of ``width``, of which a token takes ``chosen``.

    A router gives each token a probability for every expert; the most probable are chosen, and
    their outputs weighted by their probabilities, with ``normalise`` scaled to add up to one. In a
    model folder they are ``module.experts.N.name`` for the ``names`` of gate, up and down, and the
    router is ``module.gate``. ``balance`` is the weight of the loss that balances their load (see
    ``balance.py``), None without one.
    """

    count: int
    chosen: int
    width: int
    normalise: bool
    module: str
    names: tuple[str, str, str]
    balance: float | None


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """What a decoder computes, as far as the sizes of its operands do not tell.

    ``windows[i]`` is the sliding window of layer ``i``: position q attends to the positions k with
    ``q - window < k <= q``, so to itself and the ``window - 1`` before it; ``None`` is plain causal
    attention. Scores are multiplied by ``scale``. With ``qk_norm`` each head of the queries and
    keys passes an RMSNorm over its ``head_dim`` elements before the rotation. The embedding's row
    ``padding_idx`` receives no gradient from the look-up (it does receive one as a row of a tied
    output matrix), as in ``torch.nn.Embedding``. The first ``rotary_dim`` elements of a head are
    rotated. With ``fused`` the model folder stores queries, keys and values as one matrix, and gate
    and up as another.

    With ``centred`` norms a weight is stored less one (see ``kernels/rms_norm.py``); with
    ``output_norms`` what attention and the MLP add to the stream passes a norm before. Scores of
    attention are capped by ``softcap``, ``c · tanh(x / c)``, and logits by ``final_softcap``. What
    the embedding looks up is multiplied by ``embed_scale``. ``rope_kinds`` names the rotary
    embeddings that the model has (the ``layer_types`` they belong to; None where there is but one),
    and layer ``i`` uses ``rope_kinds[rope_of[i]]``.

    ``intermediate`` is the width of the MLP that a token passes; with ``experts`` that of the
    chosen ones together.
    """

    family: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    norm_eps: float
    qk_norm: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    activation: Activation
    windows: tuple[int | None, ...]
    scale: float
    padding_idx: int | None
    fused: bool
    centred: bool
    output_norms: bool
    softcap: float | None
    final_softcap: float | None
    embed_scale: float | None
    rope_kinds: tuple[str | None, ...]
    rope_of: tuple[int, ...]
    experts: Experts | None
