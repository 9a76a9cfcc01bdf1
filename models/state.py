"""The state of a unit: its split master and its AdamW moments, as typed views of its memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slideformer.graph.model import UnitSpec
from slideformer.graph.step_memory import STATE_NBYTES

STATE_DTYPES = {"hi": torch.int16, "lo": torch.int16, "m": torch.float32, "v": torch.float32}
"""The parts of a unit's state and their element types."""


@dataclass(frozen=True)
class UnitState:
    """``hi``, ``lo`` int16 [n] (see ``kernels/split.py``) and ``m``, ``v`` FP32 [n].

    What lies on NVMe is of length 0 here; `with_moments` and `with_lo` put in what was read.
    """

    hi: Tensor
    lo: Tensor
    m: Tensor
    v: Tensor

    @classmethod
    def of(cls, unit: UnitSpec, hi: Tensor, state: Tensor | None) -> UnitState:
        """Views of slot ``hi.U`` (2 bytes an element) and slot ``state.U`` (m, then v, then lo).

        ``state`` is ``lo`` alone (2 bytes an element) where the moments are on NVMe, and None where
        all of it is.
        """
        n = unit.numel
        assert hi.numel() == 2 * n
        if state is None:
            state = hi[:0]
        assert state.numel() in (0, 2 * n, STATE_NBYTES * n)
        moments = max(state.numel() - 2 * n, 0) // 2
        lo = state.numel() - 2 * moments
        # The wider ones come first, for their alignment.
        m, v, low = state.split([moments, moments, lo])
        return cls(
            hi.view(torch.int16),
            low.view(torch.int16),
            m.view(torch.float32),
            v.view(torch.float32),
        )

    def part(self, begin: int, end: int) -> UnitState:
        """Elements ``[begin, end)``."""
        return UnitState(
            self.hi[begin:end], self.lo[begin:end], self.m[begin:end], self.v[begin:end]
        )

    def with_moments(self, extent: Tensor) -> UnitState:
        """The same with moments from the bytes of an extent: m, then v, then what fills a page."""
        n = len(self.hi)
        m, v = extent[: 8 * n].view(torch.float32).split(n)
        return UnitState(self.hi, self.lo, m, v)

    def with_lo(self, extent: Tensor) -> UnitState:
        """The same with the lower halves from the bytes of an extent."""
        return UnitState(self.hi, extent[: 2 * len(self.hi)].view(torch.int16), self.m, self.v)
