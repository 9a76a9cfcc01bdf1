"""The settings of one optimizer step, from those of a run."""

from __future__ import annotations

from slideformer.config import EngineConfig
from slideformer.kernels.adamw import AdamW, Lion

_BETA2 = {"adamw": 0.999, "adamw8bit": 0.999, "lion": 0.99}
"""What the papers take."""


def optimizer_step(config: EngineConfig, lr: float | None, step: int) -> AdamW:
    """Those of step ``step``, counted from 1; ``lr`` replaces the learning rate of ``config``."""
    rule = Lion if config.optimizer == "lion" else AdamW
    return rule(
        lr=config.lr if lr is None else lr,
        beta1=config.beta1,
        beta2=_BETA2[config.optimizer] if config.beta2 is None else config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        step=step,
    )
