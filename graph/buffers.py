"""Buffers and slots: the named ranges of bytes that tasks read and write."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class Tier(StrEnum):
    """Where bytes live."""

    GPU = "gpu"
    PINNED = "pinned"
    CPU = "cpu"
    NVME = "nvme"


PAGE = 4096
"""Bytes to whose multiples places in memory and extents on NVMe are rounded: direct I/O asks it."""

HOST_TIERS = frozenset({Tier.PINNED, Tier.CPU})
"""Tiers that lie in host memory and count against its budget."""


def host_bytes(sizes: Mapping[Tier, int]) -> int:
    """Bytes of all tiers that lie in host memory."""
    return sum(size for tier, size in sizes.items() if tier in HOST_TIERS)


def whole_pages(nbytes: int) -> int:
    """``nbytes`` and what fills the last page."""
    return -(-nbytes // PAGE) * PAGE


class Role(StrEnum):
    """What a buffer holds."""

    WEIGHT = "weight"
    OPTIMIZER = "optimizer"
    GRADIENT = "gradient"
    ACTIVATION = "activation"
    INPUT = "input"
    RESULT = "result"
    CONSTANT = "constant"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class Slot:
    """A fixed place in a tier that different buffers occupy one after another."""

    name: str
    tier: Tier
    nbytes: int


@dataclass(frozen=True, slots=True)
class Buffer:
    """A named, sized range of bytes.

    With a ``slot`` it lies in that slot from byte ``offset`` on and shares those bytes with the
    slot's other buffers; without one it has a place of its own. A ``carried`` buffer keeps its
    contents from one instance of the graph to the next (weights, optimizer state).
    """

    name: str
    nbytes: int
    tier: Tier
    role: Role = Role.OTHER
    slot: str = ""
    offset: int = 0
    carried: bool = False

    @property
    def place(self) -> str:
        """Name of the storage this buffer lies in: its slot, or itself."""
        return self.slot or self.name

    @property
    def stop(self) -> int:
        """One past its last byte in `place`."""
        return self.offset + self.nbytes
