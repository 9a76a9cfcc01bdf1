"""How units are cut into chunks: the pieces that cross PCIe and are updated as a whole."""

from __future__ import annotations

from dataclasses import dataclass

from slideformer.graph.model import ALIGNMENT, ModelSpec, UnitKind, UnitSpec


@dataclass(frozen=True, slots=True)
class Chunk:
    """Elements ``[begin, end)`` of a unit; ``vocab`` numbers the vocabulary chunk it belongs to."""

    unit: str
    index: int
    begin: int
    end: int
    vocab: int = 0

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.end - self.begin

    @property
    def label(self) -> str:
        """Its qualifier in task and buffer names."""
        return f"c{self.index}"


@dataclass(frozen=True, slots=True)
class VocabChunk:
    """Rows ``[start, stop)`` of the output matrix."""

    index: int
    start: int
    stop: int


def vocab_chunks(spec: ModelSpec, count: int) -> tuple[VocabChunk, ...]:
    """Cut the vocabulary into at most ``count`` nearly equal ranges of rows."""
    rows = -(-spec.vocab // min(count, spec.vocab))
    starts = range(0, spec.vocab, rows)
    return tuple(
        VocabChunk(i, start, min(start + rows, spec.vocab)) for i, start in enumerate(starts)
    )


def chunk_unit(spec: ModelSpec, unit: UnitSpec, chunk_numel: int, vocab: int) -> tuple[Chunk, ...]:
    """Cut ``unit`` into nearly equal chunks of at most ``chunk_numel`` elements.

    Chunks begin at multiples of ``ALIGNMENT`` and are not made smaller than that. The output matrix
    is cut at rows, each chunk inside one of its ``vocab`` vocabulary chunks, and so is the
    embedding; a chunk holds at least one row there.
    """
    if unit.kind in (UnitKind.EMBED, UnitKind.HEAD):
        ranges = vocab_chunks(spec, vocab if unit is spec.head else 1)
        return tuple(_chunk_rows(spec.hidden, unit.name, ranges, chunk_numel))
    most = max(chunk_numel // ALIGNMENT, 1) * ALIGNMENT
    pieces = -(-unit.numel // most)
    step = -(-unit.numel // (pieces * ALIGNMENT)) * ALIGNMENT
    return tuple(
        Chunk(unit.name, i, begin, min(begin + step, unit.numel))
        for i, begin in enumerate(range(0, unit.numel, step))
    )


def _chunk_rows(
    hidden: int, unit: str, ranges: tuple[VocabChunk, ...], chunk_numel: int
) -> list[Chunk]:
    chunks: list[Chunk] = []
    most = max(chunk_numel // hidden, 1)
    for part in ranges:
        rows = part.stop - part.start
        pieces = -(-rows // most)
        step = -(-rows // pieces)
        for start in range(part.start, part.stop, step):
            stop = min(start + step, part.stop)
            chunks.append(Chunk(unit, len(chunks), start * hidden, stop * hidden, part.index))
    return chunks
