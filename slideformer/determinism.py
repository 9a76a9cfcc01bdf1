"""PyTorch's global setting for deterministic kernels, put back when the engine that set it ends."""

from __future__ import annotations

import os
from typing import Any

import torch


class Determinism:
    """From construction to `restore` PyTorch uses deterministic kernels only, if ``wanted``."""

    def __init__(self, wanted: bool) -> None:
        self._before: tuple[bool, bool, bool] | None = None
        if not wanted:
            return
        # cuBLAS reads its setting when it is first used.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        self._before = (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            _settings().fill_uninitialized_memory,
        )
        torch.use_deterministic_algorithms(True)
        # Every element that is read is written before; filling would cost a pass over memory.
        _settings().fill_uninitialized_memory = False

    def restore(self) -> None:
        """Put the setting back; a second time does nothing."""
        if self._before is not None:
            enabled, warn_only, fill = self._before
            torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
            _settings().fill_uninitialized_memory = fill
            self._before = None


def _settings() -> Any:
    return torch.utils.deterministic
