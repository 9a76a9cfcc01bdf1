"""Tiny random models of every supported family, built and saved by transformers itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from slideformer.graph.model import ModelSpec
from slideformer.kernels.split import join_master
from slideformer.models.families import decoder_config

Masters = dict[str, tuple[Tensor, Tensor]]

VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama-biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral": {"model_type": "mistral", "sliding_window": 5},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 24},
    "qwen3-biases": {"model_type": "qwen3", "head_dim": 24, "attention_bias": True},
    "phi3": {"model_type": "phi3", "pad_token_id": None},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 5, "sliding_window": 6},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "head_dim": 24,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 40,
    },
    "qwen3_moe-normalised": {
        "model_type": "qwen3_moe",
        "head_dim": 24,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
    },
    "gemma2": {
        "model_type": "gemma2",
        "head_dim": 24,
        "query_pre_attn_scalar": 20,
        "sliding_window": 5,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 1.5,
        "pad_token_id": None,
    },
    "gemma3_text": {
        "model_type": "gemma3_text",
        "head_dim": 24,
        "query_pre_attn_scalar": 20,
        "sliding_window": 5,
        "sliding_window_pattern": 2,
        "pad_token_id": None,
    },
    "gemma3_text-biases": {
        "model_type": "gemma3_text",
        "head_dim": 24,
        "sliding_window": 5,
        "attention_bias": True,
        "final_logit_softcapping": 1.5,
        "pad_token_id": None,
    },
    "phi3-partial": {
        "model_type": "phi3",
        "pad_token_id": None,
        "sliding_window": 7,
        "original_max_position_embeddings": 12,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.75,  # 12 of 16 elements
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
            "long_factor": [1.0, 1.3, 2.0, 3.0, 4.0, 5.0],
        },
    },
}
"""Every family, and every choice of biases that a family has."""


def tiny_config(variant: str = "llama", *, tied: bool = False, **settings: Any) -> PretrainedConfig:
    """Config of a model with grouped-query attention and about 100,000 parameters."""
    values: dict[str, Any] = {
        "vocab_size": 301,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": tied,
        **VARIANTS[variant],
        **settings,
    }
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    assert isinstance(config, PretrainedConfig)
    return config


def tiny_model(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A model of that config with all parameters random, biases and norms included, in FP32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    assert isinstance(model, PreTrainedModel)
    return model


def by_stored_name(config: PretrainedConfig, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's tensors by their names in a checkpoint, which keeps experts apart: views."""
    experts = decoder_config(config).experts
    if experts is None:
        return dict(named)
    gate, up, down = experts.names
    found: dict[str, Tensor] = {}
    for name, tensor in named.items():
        prefix, is_mlp, rest = name.partition(".mlp.")
        if not is_mlp:
            found[name] = tensor
        elif rest == "gate.weight":
            found[f"{prefix}.{experts.module}.gate.weight"] = tensor
        for i in range(experts.count):
            expert = f"{prefix}.{experts.module}.experts.{i}"
            if rest == "experts.gate_up_proj":
                parts = tensor[i].chunk(2)
                found |= {f"{expert}.{gate}.weight": parts[0], f"{expert}.{up}.weight": parts[1]}
            elif rest == "experts.down_proj":
                found[f"{expert}.{down}.weight"] = tensor[i]
    return found


def save(
    model: PreTrainedModel, folder: Path, dtype: torch.dtype, *, sharded: bool = False
) -> Path:
    """Save a model in ``dtype`` (and leave it in that), sharded or in one file."""
    model.to(dtype).save_pretrained(folder, max_shard_size="50KB" if sharded else "1GB")
    assert (folder / "model.safetensors").exists() is not sharded
    return folder


def empty_masters(spec: ModelSpec) -> Masters:
    """Host arrays for all units, full of rubbish."""
    return {
        unit.name: (
            torch.full((unit.numel,), 0x1234, dtype=torch.int16),
            torch.full((unit.numel,), 0x4321, dtype=torch.int16),
        )
        for unit in spec.units
    }


def joined(spec: ModelSpec, masters: Masters) -> Iterator[tuple[str, Tensor]]:
    """All parameters in FP32, by name, as the masters hold them."""
    for unit in spec.units:
        hi, lo = masters[unit.name]
        for param in unit.params:
            where = slice(param.offset, param.offset + param.numel)
            values = torch.empty(param.numel)
            join_master(hi[where].contiguous(), lo[where].contiguous(), values)
            yield param.key, values.view(param.shape)


def padding(spec: ModelSpec, masters: Masters) -> Tensor:
    """All elements, of both halves and all units, that belong to no parameter."""
    gaps = []
    for unit in spec.units:
        inside = torch.zeros(unit.numel, dtype=torch.bool)
        for param in unit.params:
            inside[param.offset : param.offset + param.numel] = True
        gaps += [half[~inside] for half in masters[unit.name]]
    return torch.cat(gaps)
