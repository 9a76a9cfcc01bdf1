"""The lattice of memory plans: every choice there is, whatever the budgets.

A *base* fixes what plans on it share: micro-batch, vocabulary chunks, window and size of chunks. On
a base a plan is a point of counts, one for each axis of `Counts`. Uniform decoder layers make
prefixes and suffixes stand for all subsets. Budgets only filter the lattice, so a larger budget
never takes a choice away.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from slideformer.graph.model import ModelSpec
from slideformer.graph.plan import Compute, MemoryPlan
from slideformer.memory.layout import Ints
from slideformer.memory.nvme_needs import Stored
from slideformer.memory.request import PlanRequest

CHUNK_NUMEL = 32 << 20
"""Elements of a chunk: 64 MiB in BF16, large enough for full PCIe speed."""

MAX_LAYER_CHUNKS = 8
"""Chunks of a layer; more would add tasks and overlap nothing that these do not. Where there are
fewer, chunks of half the size may be chosen: their slots are smaller."""

HEAD_TILE = 4096
"""Tokens per tile of logits; smaller tiles spend more time adding up the matrix's gradient."""

MIN_STAGING_SLOTS = 4

WINDOWS = (3, 2)

SPILLED_STEPS = 16
"""Counts of spilled layers to choose from, beside none; evenly spread."""


class Counts(NamedTuple):
    """A point on a base, or many: then each axis is an array, and all have one shape.

    This is the one list of axes. The first three are searched in full. Of the others a plan has the
    fewest that fit, since each of them moves bytes out of a tier and costs traffic.
    """

    resident: Ints
    """Units that stay on the GPU: the embedding, which is due first in a step and ready last, and
    then the layers from the first on."""
    kept: Ints
    """Last layers whose activations stay on the GPU until backward."""
    spilled: Ints
    """Other layers whose activations wait in pinned memory."""
    offloaded: Ints
    """First layers whose boundaries wait in pinned memory."""
    stored: Ints
    """Steps along the chain of what goes to NVMe (``nvme_needs.py``)."""

    def at(self, where: int | NDArray[np.bool_]) -> Counts:
        """The points that an index or a mask selects."""
        return Counts(*(axis[where] for axis in self))

    def of_residents(self, which: NDArray[np.bool_]) -> Counts:
        """Of all points, those whose number of resident units ``which`` selects."""
        return Counts(*(axis.reshape(len(which), -1)[which].ravel() for axis in self))


def bases(request: PlanRequest) -> Iterator[MemoryPlan]:
    """Every base, as the plan with all counts zero.

    Adapters are resident on all of them, as they are small; in FP32 compute, nothing is.
    """
    spec, rows = request.spec, request.rows
    bf16 = request.compute is Compute.BF16
    adapters = frozenset(unit.name for unit in spec.adapters.values() if bf16)
    divisors = [d for d in range(1, rows + 1) if rows % d == 0]
    largest_layer = max(unit.numel for unit in spec.layers)
    least_chunk = -(-largest_layer // MAX_LAYER_CHUNKS)
    chunk = max(CHUNK_NUMEL, least_chunk)
    cuts = least_chunk <= chunk // 2 < max(unit.numel for unit in spec.units)
    chunk_sizes = [chunk, chunk // 2] if cuts else [chunk]
    ratio = -(-spec.head.numel // largest_layer)
    for micro_rows in [request.micro_rows] if request.micro_rows else divisors:
        tile = request.head_tile or min(HEAD_TILE, micro_rows * request.seq_len)
        fixed = request.vocab_chunks
        for vocab_chunks in [fixed] if fixed else sorted({1, ratio, 2 * ratio}):
            vocab_rows = -(-spec.vocab // vocab_chunks)
            windows = [request.window] if request.window else WINDOWS
            for window, chunk_numel in product(windows, chunk_sizes):
                yield MemoryPlan(
                    compute=request.compute,
                    rows=rows,
                    seq_len=request.seq_len,
                    micro_rows=micro_rows,
                    vocab_chunks=vocab_chunks,
                    head_tile=tile,
                    window=window,
                    chunk_numel=chunk_numel,
                    offloaded=0,
                    # All chunks of a layer leave at once, while the next one is differentiated.
                    staging_slots=max(MIN_STAGING_SLOTS, -(-largest_layer // chunk_numel)),
                    nvme_direct=request.profile.direct_storage,
                    resident=adapters,
                    packed=request.packed,
                    optimizer=request.optimizer,
                    deferred=request.deferred,
                    workspace=request.workspace(micro_rows, vocab_rows, tile),
                )


def points(spec: ModelSpec, compute: Compute) -> Counts:
    """Every point of the axes that are searched in full; the others are zero.

    As many follow one another for each number of resident units.
    """
    layers = len(spec.layers)
    # FP32 weights would have to be joined anew all the time.
    resident = layers + 2 if compute is Compute.BF16 else 1
    # Only layers with a backward keep anything for it.
    keeping = layers - spec.lowest_trained
    spilled = sorted({keeping * i // SPILLED_STEPS for i in range(SPILLED_STEPS + 1)})
    axes = np.meshgrid(
        np.arange(resident),
        np.arange(keeping + 1),
        # Spilled layers are spread over all, of which some may have nothing to keep.
        [0] if spec.lowest_trained else spilled,
        indexing="ij",
    )
    r, k, s = (axis.ravel() for axis in axes)
    none = np.zeros_like(r)
    return Counts(r, k, s, none, none).at(k + s <= keeping)


def fewest_offloaded(spec: ModelSpec, resident: Ints) -> Ints:
    """Boundaries that are not on the GPU anyway.

    Those of layers without a backward are dropped. A streamed embedding's rows come up from pinned
    memory, where they then wait as well.
    """
    return np.maximum(spec.lowest_trained, np.where(resident > 0, 0, 1))


def boundaries_for_nvme(spec: ModelSpec, point: Counts) -> Ints:
    """Layers whose boundaries may be on NVMe: offloaded ones but for the first."""
    return np.maximum(point.offloaded - max(spec.lowest_trained, 1), 0)


def resident_units(spec: ModelSpec, count: int) -> frozenset[str]:
    """The first ``count`` units in the order in which they become resident."""
    return frozenset(["embed", *(unit.name for unit in spec.layers)][:count])


def plan_at(spec: ModelSpec, base: MemoryPlan, point: Counts, stored: Stored) -> MemoryPlan:
    """The plan at one point on a base, ``stored`` being what its steps put on NVMe."""
    offloaded = int(point.offloaded)
    return replace(
        base,
        resident=base.resident | resident_units(spec, int(point.resident)),
        kept=int(point.kept),
        spilled=int(point.spilled),
        offloaded=offloaded if offloaded > spec.lowest_trained else 0,
        nvme_moments=int(stored.moments),
        nvme_lo=int(stored.lo),
        nvme_boundaries=int(stored.boundaries),
        nvme_hi=int(stored.hi),
    )
