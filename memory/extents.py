"""Extents: named ranges of bytes on NVMe, and how they are striped over files.

All extents of a run lie one after another in one address space, cut into stripes of `STRIPE` bytes
that go round the files. Extents begin and end at multiples of `PAGE`, as direct I/O asks, so each
piece of one within a stripe does too. Loads no torch and opens nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from slideformer.graph.buffers import PAGE
from slideformer.graph.errors import GraphError

STRIPE = 4 << 20
"""Bytes of a stripe, the most that one request moves; disks reach their full rate with it."""


@dataclass(frozen=True, slots=True)
class Extent:
    """``nbytes`` bytes from ``offset`` of the address space on."""

    name: str
    offset: int
    nbytes: int


class Piece(NamedTuple):
    """Bytes ``[start, stop)`` of an extent, which lie in one file from ``offset`` on."""

    file: int
    offset: int
    start: int
    stop: int


def lay_out_extents(wanted: Mapping[str, int]) -> dict[str, Extent]:
    """Extents of these sizes, one after another.

    Raises `GraphError` for a size that is no multiple of `PAGE`.
    """
    found: dict[str, Extent] = {}
    offset = 0
    for name, nbytes in wanted.items():
        if nbytes % PAGE:
            raise GraphError(f"{name} is on NVMe with {nbytes:,} bytes; use a multiple of {PAGE:,}")
        found[name] = Extent(name, offset, nbytes)
        offset += nbytes
    return found


def pieces(extent: Extent, files: int) -> Iterator[Piece]:
    """The pieces of an extent in order."""
    start = 0
    while start < extent.nbytes:
        stripe, within = divmod(extent.offset + start, STRIPE)
        stop = min(start + STRIPE - within, extent.nbytes)
        yield Piece(stripe % files, stripe // files * STRIPE + within, start, stop)
        start = stop


def file_nbytes(total: int, files: int) -> list[int]:
    """Bytes of each of the files that hold ``total`` bytes, and no more than these together."""
    stripes, rest = divmod(total, STRIPE)
    rounds, more = divmod(stripes, files)
    sizes = [(rounds + (file < more)) * STRIPE for file in range(files)]
    sizes[more] += rest
    return sizes
