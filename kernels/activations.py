"""Names of the activations of gated blocks; loads nothing, so that planning can check them."""

from __future__ import annotations

from typing import Literal

Activation = Literal["silu", "gelu", "gelu_pytorch_tanh"]
"""The activation names of Hugging Face configurations that are supported."""

ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu", "gelu_pytorch_tanh")
