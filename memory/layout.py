"""Where places (slots, and buffers without one) lie in the arenas of their tiers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from slideformer.graph.buffers import PAGE, Tier
from slideformer.graph.errors import GraphError
from slideformer.graph.graph import TaskGraph

Ints = NDArray[np.int64]
Number = TypeVar("Number", int, Ints)


@dataclass(frozen=True)
class Layout:
    """Byte offset of every place in its tier's arena, and each arena's exact size."""

    offsets: Mapping[str, int]
    sizes: Mapping[Tier, int]


def places(graphs: Iterable[TaskGraph]) -> dict[str, tuple[Tier, int]]:
    """Every place of the graphs with its tier and the largest size any of them needs.

    Graphs that run one after another share places of the same name.
    """
    found: dict[str, tuple[Tier, int]] = {}
    for graph in graphs:
        for name, (tier, nbytes) in graph.places.items():
            known, size = found.get(name, (tier, 0))
            if known is not tier:
                raise GraphError(f"{name} is in {known} in one graph and in {tier} in {graph.name}")
            found[name] = (tier, max(size, nbytes))
    return found


def lay_out(
    wanted: Mapping[str, tuple[Tier, int]], shared: Mapping[str, str] | None = None
) -> Layout:
    """Place after place, each aligned, and nothing left between.

    Nothing is shared, but for the places that ``shared`` puts into another's memory.
    """
    shared = shared or {}
    offsets: dict[str, int] = {}
    sizes: dict[Tier, int] = {}
    for name, (tier, nbytes) in wanted.items():
        if name not in shared:
            offsets[name] = sizes.get(tier, 0)
            sizes[tier] = offsets[name] + aligned(nbytes)
    for name, other in shared.items():
        if wanted[name] != wanted[other]:
            raise GraphError(f"{name} cannot lie in the memory of {other}, which is another size")
        offsets[name] = offsets[other]
    return Layout(offsets, sizes)


def aligned(nbytes: Number) -> Number:
    """Bytes that a place of ``nbytes`` takes in its arena; or of many places, each on its own."""
    return -(-nbytes // PAGE) * PAGE
