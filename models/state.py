"""The state of a unit: its split master and its moments, as typed views of its memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from slideformer.graph.model import UnitSpec
from slideformer.graph.step_nvme import HI, LO, MOMENTS

STATE_DTYPES = {"hi": torch.int16, "lo": torch.int16, "m": torch.float32, "v": torch.float32}
"""The parts of a unit's state and their element types."""


@dataclass(frozen=True)
class UnitState:
    """``hi``, ``lo`` int16 [n] (see ``kernels/split.py``) and ``m``, ``v`` FP32 [n].

    What the unit does not have, as Lion no ``v``, is of length 0, and so is what lies on NVMe;
    `with_extent` puts in what was read from there.
    """

    hi: Tensor
    lo: Tensor
    m: Tensor
    v: Tensor

    @classmethod
    def of(cls, unit: UnitSpec, hi: Tensor | None, state: Tensor | None) -> UnitState:
        """Views of slot ``hi.U`` (2 bytes an element) and slot ``state.U`` (m, then v, then lo).

        ``hi`` is None where it is on NVMe; ``state`` is ``lo`` alone (2 bytes an element) where the
        moments are, and None where all of it is.
        """
        n = unit.numel
        nothing = torch.empty(0, dtype=torch.uint8)
        hi = nothing if hi is None else hi
        state = nothing if state is None else state
        assert hi.numel() in (0, 2 * n)
        assert state.numel() in (0, 2 * n, 6 * n, 10 * n)
        moments = max(state.numel() - 2 * n, 0)
        first = min(moments, 4 * n)
        # The wider ones come first, for their alignment.
        m, v, low = state.split([first, moments - first, state.numel() - moments])
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

    def with_extent(self, kind: str, extent: Tensor, numel: int) -> UnitState:
        """The same with its part from the bytes of an extent of ``numel`` elements.

        Of moments an extent holds m, then v; what fills its last page is left out.
        """
        if kind == MOMENTS:
            m, v = extent[: 8 * numel].view(torch.float32).split(numel)
            return replace(self, m=m, v=v)
        assert kind in (LO, HI), kind
        return replace(self, **{kind: extent[: 2 * numel].view(torch.int16)})
