"""The state of a unit: its split master and its moments, as typed views of its memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from slideformer.graph.state import BLOCK, Part

_ABSENT = {
    "hi": torch.int16,
    "lo": torch.int16,
    "m": torch.float32,
    "v": torch.float32,
    "scales": torch.float32,
}
"""The arrays, and the types of empty ones."""


@dataclass(frozen=True)
class UnitState:
    """``hi``, ``lo`` int16 [n] (see ``kernels/split.py``) and the moments ``m``, ``v`` FP32 [n].

    Or ``m``, ``v`` uint8 [n] and ``scales`` FP32 [2·blocks] (see ``kernels/quantise.py``). What the
    unit does not have, as Lion no ``v``, is of length 0, and so is what lies on NVMe; `with_extent`
    puts in what was read from there.
    """

    hi: Tensor
    lo: Tensor
    m: Tensor
    v: Tensor
    scales: Tensor

    @classmethod
    def of(
        cls, numel: int, parts: Sequence[Part], hi: Tensor | None, state: Tensor | None
    ) -> UnitState:
        """Views of slot ``hi.U`` (2 bytes an element) and slot ``state.U``, which has ``parts``.

        ``hi`` is None where it is on NVMe, and ``state`` where all of it is.
        """
        place = next((x for x in (hi, state) if x is not None), torch.empty(0))
        found = {
            name: torch.empty(0, dtype=dtype, device=place.device)
            for name, dtype in _ABSENT.items()
        }
        if hi is not None:
            found["hi"] = hi.view(torch.int16)
            assert len(found["hi"]) == numel
        if state is not None:
            found |= arrays(state, parts, numel)
            assert len(state) == sum(part.size(numel) for part in parts)
        return cls(**found)

    def part(self, begin: int, end: int) -> UnitState:
        """Elements ``[begin, end)``; with scales, ``begin`` is the first one of a block."""
        return UnitState(
            self.hi[begin:end],
            self.lo[begin:end],
            self.m[begin:end],
            self.v[begin:end],
            self.scales[2 * (begin // BLOCK) : 2 * -(-end // BLOCK)],
        )

    def with_extent(self, parts: Iterable[Part], extent: Tensor, numel: int) -> UnitState:
        """The same with those parts from the bytes of an extent of ``numel`` elements."""
        return replace(self, **arrays(extent, parts, numel))


def arrays(place: Tensor, parts: Iterable[Part], numel: int) -> dict[str, Tensor]:
    """The arrays of ``numel`` elements that lie one behind another in a place, by name.

    The wider ones come first, for their alignment; what is behind them is left out.
    """
    found: dict[str, Tensor] = {}
    begin = 0
    types: dict[Part, torch.dtype] = {part: getattr(torch, part.dtype) for part in parts}
    for part, dtype in sorted(types.items(), key=lambda each: -each[1].itemsize):
        end = begin + part.size(numel)
        found[part.name] = place[begin:end].view(dtype)
        begin = end
    return found
