"""Shapes of well-known models, for benchmarks and memory plans without a model folder.

Only sizes and positions matter here; weights, tokenizers and token ids of the models do not. A
shape can be planned without loading transformers, which takes longer than planning.
"""

from __future__ import annotations

import copy
import difflib
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from slideformer.graph.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_DEFAULTS: dict[str, Any] = {
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "router_jitter_noise": 0.0,
    "sliding_window": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "output_router_logits": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
"""What the configs of transformers fill in where a shape below says nothing, of what is read."""


def _shape(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, **more: Any
) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        **more,
    }


def _layer_types(layers: int, period: int) -> list[str]:
    """Every ``period``-th layer attends to all positions, the others to a window."""
    return [
        "sliding_attention" if number % period else "full_attention"
        for number in range(1, layers + 1)
    ]


def _rope(theta: float, **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta, **more}


def _llama3_rope(factor: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


_LLAMA3: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
}
_LLAMA31 = {**_LLAMA3, "rope_parameters": _llama3_rope(8.0), "tie_word_embeddings": False}
_LLAMA32 = {**_LLAMA3, "rope_parameters": _llama3_rope(32.0), "tie_word_embeddings": True}
_QWEN3: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_parameters": _rope(1000000.0),
}

_PHI3: dict[str, Any] = {
    "model_type": "phi3",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "pad_token_id": None,
}

_GEMMA: dict[str, Any] = {
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
}
_GEMMA2: dict[str, Any] = {
    **_GEMMA,
    "model_type": "gemma2",
    "vocab_size": 256000,
    "max_position_embeddings": 8192,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}

_SHAPES: dict[str, dict[str, Any]] = {
    # No model at all: runs everywhere in no time.
    "tiny": _shape(64, 128, 2, 4, 2, **{**_LLAMA3, "vocab_size": 320, "tie_word_embeddings": True}),
    "llama3-1b": _shape(2048, 8192, 16, 32, 8, **_LLAMA32),
    "llama3-3b": _shape(3072, 8192, 28, 24, 8, **_LLAMA32),
    "llama3-8b": _shape(4096, 14336, 32, 32, 8, **_LLAMA31),
    "llama3-70b": _shape(8192, 28672, 80, 64, 8, **_LLAMA31),
    "llama2-13b": _shape(
        5120,
        13824,
        40,
        40,
        40,
        model_type="llama",
        vocab_size=32000,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
    ),
    "qwen2.5-72b": _shape(
        8192,
        29568,
        80,
        64,
        8,
        model_type="qwen2",
        vocab_size=152064,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        rope_parameters=_rope(1000000.0),
    ),
    "qwen3-4b": _shape(2560, 9728, 36, 32, 8, tie_word_embeddings=True, **_QWEN3),
    "qwen3-8b": _shape(4096, 12288, 36, 32, 8, **_QWEN3),
    "qwen3-14b": _shape(5120, 17408, 40, 40, 8, **_QWEN3),
    "phi3-mini": _shape(3072, 8192, 32, 32, 32, **_PHI3, vocab_size=32064, sliding_window=2047),
    "phi4-mini": _shape(
        3072,
        8192,
        32,
        24,
        8,
        **_PHI3,
        vocab_size=200064,
        rope_parameters=_rope(10000.0, partial_rotary_factor=0.75),
        tie_word_embeddings=True,
    ),
    "phi4-14b": _shape(
        5120, 17920, 40, 40, 10, **{**_PHI3, "max_position_embeddings": 16384}, vocab_size=100352
    ),
    "mixtral-8x7b": _shape(
        4096,
        14336,
        32,
        32,
        8,
        model_type="mixtral",
        vocab_size=32000,
        max_position_embeddings=32768,
        rms_norm_eps=1e-5,
        num_experts=8,
        num_experts_per_tok=2,
        rope_parameters=_rope(1000000.0),
    ),
    "qwen3-30b-a3b": _shape(
        2048,
        6144,
        48,
        32,
        4,
        **{**_QWEN3, "model_type": "qwen3_moe"},
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
    ),
    "gemma2-2b": _shape(2304, 9216, 26, 8, 4, layer_types=_layer_types(26, 2), **_GEMMA2),
    "gemma2-9b": _shape(3584, 14336, 42, 16, 8, layer_types=_layer_types(42, 2), **_GEMMA2),
    "gemma3-1b": _shape(
        1152,
        6912,
        26,
        4,
        1,
        **_GEMMA,
        model_type="gemma3_text",
        vocab_size=262144,
        max_position_embeddings=32768,
        sliding_window=512,
        layer_types=_layer_types(26, 6),
        rope_parameters={
            "sliding_attention": _rope(10000.0),
            "full_attention": _rope(1000000.0),
        },
        final_logit_softcapping=None,
    ),
    "mistral-large-123b": _shape(
        12288,
        28672,
        88,
        96,
        8,
        model_type="mistral",
        head_dim=128,
        vocab_size=32768,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        sliding_window=None,
        rope_parameters=_rope(1000000.0),
    ),
}

SHAPE_NAMES = tuple(_SHAPES)
"""The named shapes."""


def shape_settings(name: str) -> SimpleNamespace:
    """What is read of a named shape, as its config has it; loads nothing.

    Raises:
        ConfigError: the name is unknown; the message gives the nearest one.
    """
    settings = _settings(name)
    types = ["full_attention"] * settings["num_hidden_layers"]
    return SimpleNamespace(**{**_DEFAULTS, "layer_types": types, **settings})


def shape_config(name: str) -> PretrainedConfig:
    """The Hugging Face config of a named shape.

    Raises:
        ConfigError: the name is unknown; the message gives the nearest one.
    """
    from transformers import AutoConfig, PretrainedConfig

    settings = _settings(name)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    assert isinstance(config, PretrainedConfig)
    return config


def _settings(name: str) -> dict[str, Any]:
    if name not in _SHAPES:
        near = difflib.get_close_matches(name, SHAPE_NAMES, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"unknown shape {name!r}: {hint}known are {', '.join(SHAPE_NAMES)}")
    # A copy: a config keeps the mappings it is given and edits them.
    return copy.deepcopy(_SHAPES[name])
