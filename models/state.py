"""The host state of a unit: its split master and its AdamW moments, as typed views of two slots."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slideformer.graph.model import UnitSpec
from slideformer.graph.step_memory import STATE_NBYTES


@dataclass(frozen=True)
class UnitState:
    """``hi``, ``lo`` int16 [n] (see ``kernels/split.py``) and ``m``, ``v`` FP32 [n]."""

    hi: Tensor
    lo: Tensor
    m: Tensor
    v: Tensor

    @classmethod
    def of(cls, unit: UnitSpec, hi: Tensor, state: Tensor) -> UnitState:
        """Views of slot ``hi.U`` (2 bytes an element) and slot ``state.U`` (m, then v, then lo)."""
        n = unit.numel
        assert hi.numel() == 2 * n
        assert state.numel() == STATE_NBYTES * n
        m, v, lo = state.split([4 * n, 4 * n, 2 * n])  # the wider ones first, for their alignment
        return cls(
            hi.view(torch.int16),
            lo.view(torch.int16),
            m.view(torch.float32),
            v.view(torch.float32),
        )

    def part(self, begin: int, end: int) -> UnitState:
        """Elements ``[begin, end)``."""
        return UnitState(
            self.hi[begin:end], self.lo[begin:end], self.m[begin:end], self.v[begin:end]
        )
