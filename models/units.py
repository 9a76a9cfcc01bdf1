"""How a model's parameters are named in a model folder and laid out in units.

Operand names are those that ``layer.py`` reads; parameter names are those of Hugging
Face. Sizes come from a Hugging Face config, so a spec needs no weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import TYPE_CHECKING, Any, TypeAlias

from slideformer.graph.model import ModelSpec, ParamGroup, UnitKind, UnitSpec, layout_unit
from slideformer.models.decoder import DecoderConfig, Experts
from slideformer.models.families import decoder_config
from slideformer.models.settings import ModelSettings

if TYPE_CHECKING:
    from torch import Tensor

MasterWeights: TypeAlias = "Mapping[str, tuple[Tensor, Tensor]]"
"""Unit name → ``(hi, lo)``, the two halves of its FP32 master weights: CPU tensors int16 [n] with
n the unit's ``numel`` (see ``slideformer.kernels.split``). Of a frozen unit ``lo`` may be empty:
then its weights are known in BF16 alone."""

EMBED_KEY = "model.embed_tokens.weight"
"""Name of the token matrix in a model folder."""

HEAD_KEY = "lm_head.weight"
"""Name of the output matrix in a model folder; absent or equal to the token matrix when tied."""


def model_spec(config: ModelSettings) -> ModelSpec:
    """Split a model into units: ``embed``, ``L00`` …, ``norm`` and, unless tied, ``head``.

    The names of all parameters are those of the model folder.

    Raises:
        UnsupportedModelError: the family, or a setting of it, is not implemented.
    """
    decoder = decoder_config(config)
    matrix = (config.vocab_size, decoder.hidden)
    layers = len(decoder.windows)
    width = 3 if layers >= 100 else 2
    units = [_one_operand_unit("embed", UnitKind.EMBED, EMBED_KEY, matrix)]
    units += [
        layout_unit(f"L{i:0{width}d}", UnitKind.LAYER, _layer_groups(decoder, f"model.layers.{i}."))
        for i in range(layers)
    ]
    units.append(_one_operand_unit("norm", UnitKind.NORM, "model.norm.weight", (decoder.hidden,)))
    if not config.tie_word_embeddings:
        units.append(_one_operand_unit("head", UnitKind.HEAD, HEAD_KEY, matrix))
    return ModelSpec(
        family=decoder.family,
        hidden=decoder.hidden,
        intermediate=decoder.intermediate,
        heads=decoder.heads,
        kv_heads=decoder.kv_heads,
        head_dim=decoder.head_dim,
        rotary_dim=decoder.rotary_dim,
        vocab=config.vocab_size,
        max_positions=config.max_position_embeddings,
        tied=bool(config.tie_word_embeddings),
        units=tuple(units),
        windows=tuple(sorted({window for window in decoder.windows if window is not None})),
        balanced=_balanced(decoder),
        output_norms=decoder.output_norms,
        softcapped=decoder.softcap is not None,
        ropes=len(decoder.rope_kinds),
    )


def _balanced(decoder: DecoderConfig) -> int:
    experts = decoder.experts
    return 0 if experts is None or experts.balance is None else experts.count


def _one_operand_unit(name: str, kind: UnitKind, key: str, shape: tuple[int, ...]) -> UnitSpec:
    return layout_unit(name, kind, [ParamGroup("weight", ((key, shape),), len(shape) > 1)])


def _layer_groups(decoder: DecoderConfig, prefix: str) -> list[ParamGroup]:
    """The operands of one layer: matrices first, then biases and norms.

    Weight decay is for the matrices alone, as in the Trainer of transformers.
    """
    hidden, inner = decoder.hidden, decoder.intermediate
    q_rows, kv_rows = decoder.heads * decoder.head_dim, decoder.kv_heads * decoder.head_dim
    qkv: tuple[tuple[str, int], ...] = (
        ("q_proj", q_rows),
        ("k_proj", kv_rows),
        ("v_proj", kv_rows),
    )
    gate_up: tuple[tuple[str, int], ...] = (("gate_proj", inner), ("up_proj", inner))
    if decoder.fused:
        qkv, gate_up = (("qkv_proj", q_rows + 2 * kv_rows),), (("gate_up_proj", 2 * inner),)
    # (operand, module, its projections and their rows, columns, has a bias)
    projections = [
        ("qkv", "self_attn", qkv, hidden, decoder.qkv_bias),
        ("o", "self_attn", (("o_proj", hidden),), q_rows, decoder.o_bias),
    ]
    if decoder.experts is None:
        projections += [
            ("gate_up", "mlp", gate_up, hidden, decoder.mlp_bias),
            ("down", "mlp", (("down_proj", hidden),), inner, decoder.mlp_bias),
        ]
    groups = [
        ParamGroup(
            f"{operand}.weight",
            tuple((f"{prefix}{module}.{p}.weight", (rows, columns)) for p, rows in parts),
            decay=True,
        )
        for operand, module, parts, columns, _ in projections
    ]
    if decoder.experts is not None:
        groups += _expert_groups(decoder.experts, hidden, prefix)
    groups += [
        ParamGroup(
            f"{operand}.bias",
            tuple((f"{prefix}{module}.{p}.bias", (rows,)) for p, rows in parts),
            decay=False,
        )
        for operand, module, parts, _, has_bias in projections
        if has_bias
    ]
    return groups + _norm_groups(decoder, prefix)


def _norm_groups(decoder: DecoderConfig, prefix: str) -> list[ParamGroup]:
    hidden = decoder.hidden
    norms = [("input_norm.weight", "input_layernorm", hidden)]
    if decoder.output_norms:
        norms += [
            ("o_norm.weight", "post_attention_layernorm", hidden),
            ("post_norm.weight", "pre_feedforward_layernorm", hidden),
            ("down_norm.weight", "post_feedforward_layernorm", hidden),
        ]
    else:
        norms.append(("post_norm.weight", "post_attention_layernorm", hidden))
    if decoder.qk_norm:
        norms += [
            ("q_norm.weight", "self_attn.q_norm", decoder.head_dim),
            ("k_norm.weight", "self_attn.k_norm", decoder.head_dim),
        ]
    return [
        ParamGroup(operand, ((f"{prefix}{module}.weight", (size,)),), decay=False)
        for operand, module, size in norms
    ]


def _expert_groups(experts: Experts, hidden: int, prefix: str) -> list[ParamGroup]:
    """The router, and the matrices of all experts one after another."""
    module = f"{prefix}{experts.module}"
    gate, up, down = experts.names
    share = Fraction(experts.chosen, experts.count)

    def stacked(names: tuple[str, ...], shape: tuple[int, int]) -> tuple[tuple[str, Any], ...]:
        return tuple(
            (f"{module}.experts.{i}.{name}.weight", shape)
            for i in range(experts.count)
            for name in names
        )

    router = ((f"{module}.gate.weight", (experts.count, hidden)),)
    return [
        ParamGroup("router.weight", router, decay=True),
        ParamGroup("gate_up.weight", stacked((gate, up), (experts.width, hidden)), True, share),
        ParamGroup("down.weight", stacked((down,), (hidden, experts.width)), True, share),
    ]
