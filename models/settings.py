"""Settings of Hugging Face configs that families share, read and checked.

What a setting asks for and the code does not do is refused by name.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, TypeAlias

from slideformer.graph.errors import UnsupportedModelError
from slideformer.models.decoder import Experts

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ModelSettings: TypeAlias = "PretrainedConfig | SimpleNamespace"
"""What is read of a model: a Hugging Face config, or a named shape's settings alone."""


def no_windows(config: ModelSettings) -> tuple[int | None, ...]:
    """Plain causal attention in every layer."""
    return tuple([None] * config.num_hidden_layers)


def same_window(config: ModelSettings) -> tuple[int | None, ...]:
    """``sliding_window`` in every layer (these do not look at ``layer_types``)."""
    return tuple([config.sliding_window] * config.num_hidden_layers)


def window_by_layer_type(config: ModelSettings) -> tuple[int | None, ...]:
    """``sliding_window`` in the layers that ``layer_types`` names ``sliding_attention`` (Qwen).

    The config class itself derives ``layer_types`` from ``use_sliding_window`` and
    ``max_window_layers`` where they are not given, and clears ``sliding_window`` where unused.
    """
    if len(config.layer_types) != config.num_hidden_layers:
        raise UnsupportedModelError(
            f"layer_types has {len(config.layer_types)} entries, num_hidden_layers is"
            f" {config.num_hidden_layers}: give one entry for each layer"
        )
    windows: list[int | None] = []
    for layer, kind in enumerate(config.layer_types):
        if kind not in ("full_attention", "sliding_attention"):
            raise unsupported(
                config, f"layer_types[{layer}]", kind, "full_attention and sliding_attention"
            )
        if kind == "sliding_attention" and config.sliding_window is None:
            raise UnsupportedModelError(
                f"layer_types[{layer}] is sliding_attention but no window is set: set"
                " use_sliding_window to true and sliding_window to a number of tokens"
            )
        windows.append(config.sliding_window if kind == "sliding_attention" else None)
    return tuple(windows)


def padding_idx(config: ModelSettings) -> int | None:
    """``pad_token_id`` as ``torch.nn.Embedding`` reads it: negative counts from the end."""
    index: int | None = config.pad_token_id
    if index is None:
        return None
    if not -config.vocab_size <= index < config.vocab_size:
        raise unsupported(config, "pad_token_id", index, f"below vocab_size ({config.vocab_size})")
    return index + config.vocab_size if index < 0 else index


def unsupported(
    config: ModelSettings, setting: str, found: object, supported: str
) -> UnsupportedModelError:
    """The error for a setting whose value ``found`` is none of those ``supported``."""
    return UnsupportedModelError(
        f"{config.model_type} model with {setting} {found!r} is not supported: supported is"
        f" {supported}; change it in config.json only if the model was trained that way"
    )


def mixtral_experts(config: ModelSettings) -> Experts:
    """Eight experts and the like in every layer; the chosen ones' weights add up to one."""
    names = "block_sparse_moe", ("w1", "w3", "w2")
    return _experts(config, config.intermediate_size, names, normalise=True)


def qwen_experts(config: ModelSettings) -> Experts:
    """Small experts in every layer; layers without experts among them are refused."""
    if config.decoder_sparse_step != 1 or config.mlp_only_layers:
        raise UnsupportedModelError(
            f"{config.model_type} model with decoder_sparse_step {config.decoder_sparse_step} and"
            f" mlp_only_layers {config.mlp_only_layers} is not supported: supported are models"
            " whose layers all have experts, 1 and []"
        )
    names = "mlp", ("gate_proj", "up_proj", "down_proj")
    normalise = bool(config.norm_topk_prob)
    return _experts(config, config.moe_intermediate_size, names, normalise=normalise)


def _experts(
    config: ModelSettings,
    width: int,
    names: tuple[str, tuple[str, str, str]],
    *,
    normalise: bool,
) -> Experts:
    count, chosen = config.num_experts, config.num_experts_per_tok
    if not 1 <= chosen <= count:
        raise unsupported(
            config, "num_experts_per_tok", chosen, f"1 to the number of experts, {count}"
        )
    # As in transformers, where training has this loss if router logits are put out.
    balance = config.router_aux_loss_coef if config.output_router_logits else None
    return Experts(count, chosen, width, normalise, *names, balance)
