"""Which model families are supported, and what the decoder layers of each compute.

A Hugging Face config becomes a :class:`DecoderConfig`; a family or a setting that the arithmetic of
``layer.py`` does not cover is refused by name. A further family is one entry of ``FAMILIES``. How
parameters are named and laid out is the matter of ``units.py``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slideformer.graph.errors import CheckpointError, UnsupportedModelError
from slideformer.kernels.activations import ACTIVATIONS, Activation
from slideformer.models.decoder import DecoderConfig, Experts
from slideformer.models.settings import (
    ModelSettings,
    mixtral_experts,
    no_windows,
    padding_idx,
    qwen_experts,
    same_window,
    unsupported,
    window_by_layer_type,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
"""Kinds of rotary position embedding that are supported."""

_ACTIVATIONS: dict[str, Activation] = {**{name: name for name in ACTIVATIONS}, "swish": "silu"}


@dataclass(frozen=True, slots=True)
class Family:
    """What distinguishes one ``model_type`` from another; functions take the Hugging Face config.

    ``rotary`` names the class of its rotary embedding in
    ``transformers.models.<model_type>.modeling_<model_type>``. ``partial_rotary``: whether that
    class heeds ``partial_rotary_factor``. ``fused``: whether the model folder stores queries, keys
    and values as one matrix, and gate and up as another. ``dropouts`` are its dropout settings,
    ``activation`` is the name of that setting. ``gemma``: the norms, caps and embedding of Gemma.
    ``softcapped``: whether it caps scores of attention. ``rope_by_type``: whether it has a rotary
    embedding for each kind of ``layer_types``. ``experts`` describes the experts of its layers.
    """

    rotary: str
    windows: Callable[[ModelSettings], tuple[int | None, ...]]
    qk_norm: bool = False
    qkv_bias: Callable[[ModelSettings], bool] = lambda _: False
    o_bias: Callable[[ModelSettings], bool] = lambda _: False
    mlp_bias: Callable[[ModelSettings], bool] = lambda _: False
    partial_rotary: bool = False
    fused: bool = False
    dropouts: tuple[str, ...] = ("attention_dropout",)
    activation: str = "hidden_act"
    gemma: bool = False
    softcapped: bool = False
    experts: Callable[[ModelSettings], Experts] | None = None
    rope_by_type: bool = False


def _attention_bias(config: ModelSettings) -> bool:
    return bool(config.attention_bias)


FAMILIES: Mapping[str, Family] = {
    "llama": Family(
        rotary="LlamaRotaryEmbedding",
        windows=no_windows,
        qkv_bias=_attention_bias,
        o_bias=_attention_bias,
        mlp_bias=lambda config: bool(config.mlp_bias),
    ),
    "mistral": Family(rotary="MistralRotaryEmbedding", windows=same_window),
    "gemma2": Family(
        rotary="Gemma2RotaryEmbedding",
        windows=window_by_layer_type,
        qkv_bias=_attention_bias,
        o_bias=_attention_bias,
        activation="hidden_activation",
        gemma=True,
        softcapped=True,
    ),
    "gemma3_text": Family(
        rotary="Gemma3RotaryEmbedding",
        windows=window_by_layer_type,
        qk_norm=True,
        qkv_bias=_attention_bias,
        o_bias=_attention_bias,
        activation="hidden_activation",
        gemma=True,
        rope_by_type=True,
    ),
    "mixtral": Family(
        rotary="MixtralRotaryEmbedding",
        windows=same_window,
        dropouts=("attention_dropout", "router_jitter_noise"),
        experts=mixtral_experts,
    ),
    "qwen3_moe": Family(
        rotary="Qwen3MoeRotaryEmbedding",
        windows=same_window,
        qk_norm=True,
        qkv_bias=_attention_bias,
        o_bias=_attention_bias,
        experts=qwen_experts,
    ),
    "phi3": Family(  # Phi-3, Phi-3.5 and Phi-4, the dense language models
        rotary="Phi3RotaryEmbedding",
        windows=same_window,
        partial_rotary=True,
        fused=True,
        dropouts=("attention_dropout", "resid_pdrop", "embd_pdrop"),
    ),
    "qwen2": Family(
        rotary="Qwen2RotaryEmbedding",
        windows=window_by_layer_type,
        qkv_bias=lambda _: True,
    ),
    "qwen3": Family(
        rotary="Qwen3RotaryEmbedding",
        windows=window_by_layer_type,
        qk_norm=True,
        qkv_bias=_attention_bias,
        o_bias=_attention_bias,
    ),
}
"""The supported families by ``model_type``."""


_SIZES: Mapping[str, int] = {
    "num_hidden_layers": 10_000,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 22,
    "moe_intermediate_size": 1 << 22,
    "num_attention_heads": 1 << 14,
    "num_key_value_heads": 1 << 14,
    "head_dim": 1 << 14,
    "vocab_size": 1 << 26,
    "max_position_embeddings": 1 << 31,
    "num_experts": 1 << 14,
    "num_local_experts": 1 << 14,
    "num_experts_per_tok": 1 << 14,
}
"""The most that a setting may be, far beyond any model; the least is 1."""


def read_model_config(folder: Path) -> PretrainedConfig:
    """Read ``config.json`` of a model folder. Code that a folder ships is never run.

    Raises:
        CheckpointError: the folder or its ``config.json`` is missing or malformed.
        UnsupportedModelError: its ``model_type`` is not one of ``FAMILIES``.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"model folder {folder} does not exist or is not a folder: give a folder that holds"
            " config.json and *.safetensors (`hf download NAME --local-dir FOLDER` fetches one)"
        )
    path = folder / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"model folder {folder} has no config.json: is it a Hugging Face model, fully"
            " downloaded?"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a JSON {type(content).__name__}, not an object")
    family_of(content.get("model_type"))
    for name, most in _SIZES.items():  # before anything is as long as one of these says
        size = content.get(name)
        if isinstance(size, int) and not 1 <= size <= most:
            raise CheckpointError(f"{path}: {name} is {size}; it must be between 1 and {most}")
    from transformers import AutoConfig, PretrainedConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers checks fields with errors of many types of its own
        raise CheckpointError(f"{path} is not a valid model config: {_one_line(error)}") from error
    assert isinstance(config, PretrainedConfig)
    return config


def family_of(model_type: Any) -> Family:
    """The family of a ``model_type``.

    Raises:
        UnsupportedModelError: there is none.
    """
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise UnsupportedModelError(
            f"model_type {model_type!r} is not supported: supported are {', '.join(FAMILIES)}"
        )
    return family


def decoder_config(config: ModelSettings) -> DecoderConfig:
    """Describe the arithmetic of a model.

    Raises:
        UnsupportedModelError: the family, or a setting of it, is not implemented.
    """
    family = family_of(config.model_type)
    _refuse_unsupported(config, family)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    # Attention of transformers reads head_dim only where it is set, in every family.
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    if heads % kv_heads:
        raise unsupported(
            config, "num_key_value_heads", kv_heads, f"divisors of num_attention_heads ({heads})"
        )
    if head_dim % 2:  # rotary embeddings turn pairs
        raise unsupported(config, "head_dim", head_dim, "even numbers")
    windows = family.windows(config)
    if any(window is not None and window < 1 for window in windows):
        raise unsupported(config, "sliding_window", config.sliding_window, "1 and more, or null")
    kinds, rope_of = _ropes(config, family)
    experts = family.experts(config) if family.experts else None
    return DecoderConfig(
        family=config.model_type,
        hidden=config.hidden_size,
        intermediate=experts.chosen * experts.width if experts else config.intermediate_size,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        rotary_dim=_rotary_dim(config, family, head_dim),
        norm_eps=config.rms_norm_eps,
        qk_norm=family.qk_norm,
        qkv_bias=family.qkv_bias(config),
        o_bias=family.o_bias(config),
        mlp_bias=family.mlp_bias(config),
        activation=_ACTIVATIONS[getattr(config, family.activation)],
        windows=windows,
        scale=(config.query_pre_attn_scalar if family.gemma else head_dim) ** -0.5,
        padding_idx=padding_idx(config),
        fused=family.fused,
        centred=family.gemma,
        output_norms=family.gemma,
        softcap=config.attn_logit_softcapping if family.softcapped else None,
        final_softcap=config.final_logit_softcapping if family.gemma else None,
        embed_scale=config.hidden_size**0.5 if family.gemma else None,
        rope_kinds=kinds,
        rope_of=rope_of,
        experts=experts,
    )


def _ropes(config: ModelSettings, family: Family) -> tuple[tuple[str | None, ...], tuple[int, ...]]:
    """``rope_kinds`` and ``rope_of`` of the decoder."""
    if not family.rope_by_type:
        return (None,), (0,) * config.num_hidden_layers
    kinds = sorted(set(config.layer_types))
    return tuple(kinds), tuple(kinds.index(kind) for kind in config.layer_types)


def _rotary_dim(config: ModelSettings, family: Family, head_dim: int) -> int:
    """How many elements of a head are rotated."""
    factors = {rope.get("partial_rotary_factor", 1.0) for rope in _rope_parameters(config, family)}
    if factors == {1.0}:
        return head_dim
    factor = max(factors - {1.0})
    rotated = int(head_dim * factor)
    if not family.partial_rotary or rotated % 2 or not 0 < rotated < head_dim:
        supported = "shares of a head with an even number" if family.partial_rotary else "1.0"
        raise unsupported(config, "partial_rotary_factor", factor, supported)
    return rotated


def _refuse_unsupported(config: ModelSettings, family: Family) -> None:
    """Raise for settings that change the arithmetic in ways that are not implemented."""
    activation = getattr(config, family.activation)
    if activation not in _ACTIVATIONS:
        raise unsupported(config, family.activation, activation, ", ".join(_ACTIVATIONS))
    for dropout in family.dropouts:
        if getattr(config, dropout):
            raise unsupported(config, dropout, getattr(config, dropout), "0")
    if getattr(config, "quantization_config", None):
        raise unsupported(
            config, "quantization_config", "set", "float32, bfloat16 and float16 weights"
        )
    if (getattr(config, "pretraining_tp", None) or 1) != 1:
        raise unsupported(config, "pretraining_tp", config.pretraining_tp, "1")
    if not getattr(config, "is_causal", True):
        raise unsupported(config, "is_causal", False, "true")
    if getattr(config, "is_heterogeneous", False):
        raise unsupported(config, "per_layer_config", "set", "layers of one shape")
    if getattr(config, "use_bidirectional_attention", False):
        raise unsupported(config, "use_bidirectional_attention", True, "false")
    for rope in _rope_parameters(config, family):
        if rope.get("rope_type") not in ROPE_TYPES:
            raise unsupported(config, "rope_type", rope.get("rope_type"), ", ".join(ROPE_TYPES))


def _rope_parameters(config: ModelSettings, family: Family) -> list[dict[str, Any]]:
    """The settings of each of its rotary embeddings."""
    kinds, _ = _ropes(config, family)
    return [config.rope_parameters if k is None else config.rope_parameters[k] for k in kinds]


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
