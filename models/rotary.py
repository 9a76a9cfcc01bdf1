"""Cosine and sine tables of rotary position embeddings, for every scaling a config may ask for.

The frequencies come from the family's own module in transformers, so each kind of scaling means
what it means there; the tables are then built here in FP32. Applying them is a kernel's work.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor
from transformers import PretrainedConfig

from slideformer.models.families import family_of


def rope_tables(
    config: PretrainedConfig, seq_len: int, device: torch.device, kind: str | None = None
) -> tuple[Tensor, Tensor]:
    """Tables for positions ``0 … seq_len - 1``: cosine and sine, FP32 ``[seq_len, R]``.

    R is the number of elements of a head that are rotated. ``table[p, i]`` belongs to frequency
    ``i mod (R / 2)``, the half-split layout of Su et al., RoFormer (arXiv 2104.09864), as used by
    Llama. Factors on the attention scores that a scaling asks for (YaRN, LongRoPE) are multiplied
    into both tables. Scalings that depend on the length (LongRoPE, dynamic) go by ``seq_len``.
    ``kind`` is one of the decoder's ``rope_kinds``.

    Raises:
        UnsupportedModelError: the family is not supported.
    """
    name = config.model_type.removesuffix("_text")  # a part of a model for text and images
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    with torch.device("cpu"), torch.no_grad():
        rotary = getattr(module, family_of(config.model_type).rotary)(config)
        # Dynamic scaling picks its frequencies by the longest position a forward sees; this
        # forward of the last position alone makes that choice, its result is not needed.
        arguments, prefix = ((), "") if kind is None else ((kind,), f"{kind}_")
        rotary(torch.empty(0), torch.tensor([[seq_len - 1]]), *arguments)
        frequencies: Tensor = getattr(rotary, f"{prefix}inv_freq").float()
    # A broadcast product and not a matrix product: the latter may run in TF32 on a GPU, which
    # cannot hold positions above 2048 exactly.
    positions = torch.arange(seq_len, device=device, dtype=torch.float32)
    angles = positions[:, None] * frequencies.to(device)[None, :]
    angles = torch.cat((angles, angles), dim=-1)
    scale: float = getattr(rotary, f"{prefix}attention_scaling")
    return angles.cos() * scale, angles.sin() * scale
