"""What plans take in each tier, in closed form: of all points of a base at once.

Every formula is the sum of the places that the step compiler declares, each rounded up as
``layout.py`` does; a test holds both equal. `peaks` adds the places themselves up.
"""

from __future__ import annotations

import numpy as np

from slideformer.graph.buffers import Tier
from slideformer.graph.graph import TaskGraph
from slideformer.graph.plan import Compute, MemoryPlan, kept_nbytes
from slideformer.graph.step import footprint
from slideformer.graph.step_activations import SPILL_SLOTS
from slideformer.memory.lattice import Counts, fewest_offloaded
from slideformer.memory.layout import Ints, aligned, lay_out
from slideformer.memory.request import PlanRequest
from slideformer.memory.unit_sizes import Chunks

SPARE_BOUNDARIES = 2
"""Boundary slots beyond what the program needs at once, so that copies run ahead and behind."""

SPARE_WHEN_SPILLING = 6
"""The same while spilled activations keep the copies of boundaries waiting."""

MIN_GRADIENT_SLOTS = 2


def peaks(request: PlanRequest, plan: MemoryPlan, step: TaskGraph | None = None) -> dict[Tier, int]:
    """Predicted peak bytes per tier, the interpreter's, the context's and workspace included.

    ``step`` is the graph of the plan's step, if there is one already.
    """
    sizes = {
        Tier.GPU: 0,
        Tier.PINNED: 0,
        Tier.CPU: 0,
        **lay_out(footprint(request.spec, plan, step)).sizes,
    }
    sizes[Tier.GPU] += plan.workspace + request.profile.gpu_overhead
    sizes[Tier.CPU] += request.profile.host_overhead
    return sizes


class Needs:
    """Bytes that plans on ``base`` take, overheads included, for points with nothing on NVMe.

    Gradients are counted in the fewest slots that work, deferred each in one of its own.
    ``gradients`` is, by the number of resident units, how many of them could be parked at once, and
    ``gradient`` the bytes of one's slot. ``chunks``, if given, are those of a base with as many
    vocabulary chunks.
    """

    def __init__(
        self, request: PlanRequest, base: MemoryPlan, chunks: Chunks | None = None
    ) -> None:
        self._request, self._base, self._spec = request, base, request.spec
        self._layers, self._dropped = len(request.spec.layers), request.spec.lowest_trained
        self._micro = base.micro_batches
        boundary = base.micro_tokens * request.spec.hidden * base.compute.nbytes
        kept = kept_nbytes(request.spec, base)
        self._boundary, self._boundaries = aligned(boundary), aligned(self._micro * boundary)
        self._kept, self._spilled = aligned(kept), aligned(self._micro * kept)
        self._chunks = chunks or Chunks(request.spec, base)
        units = np.arange(self._layers + 2)
        self._gpu = self._gpu_by_resident(units)
        self.gradients, self.gradient = self._gradients_by_resident(units)
        self._host = self._host_by_resident(units)

    # -- what counts add -------------------------------------------------------------------------

    def boundary_slots(self, point: Counts) -> Ints:
        """Slots that boundaries take on the GPU."""
        micro = self._micro
        # Forward leaves those that are not offloaded, and each layer's output comes before its
        # input goes. A resident embedding has a place of its own for the boundaries' gradients.
        waiting = (self._layers - point.offloaded + 1) * micro + 1 - (point.resident > 0)
        spare = np.where(point.spilled > 0, SPARE_WHEN_SPILLING, SPARE_BOUNDARIES)
        return np.maximum(micro + 1, waiting) + spare

    def gpu(self, point: Counts) -> Ints:
        """GPU bytes."""
        kept = point.kept * self._micro + SPILL_SLOTS * (point.spilled > 0)
        slots = self.boundary_slots(point)
        total: Ints = self._gpu[point.resident] + kept * self._kept + slots * self._boundary
        return total

    def host(self, point: Counts) -> Ints:
        """Host bytes."""
        moved = (point.offloaded - self._dropped) * self._boundaries
        moved += point.spilled * self._spilled
        if self._dropped:  # the embedding's rows still come up from there
            moved += (point.resident == 0) * self._boundaries
        total: Ints = self._host[point.resident] + moved
        return total

    def fewest_offloaded(self, point: Counts, room: int) -> Ints:
        """The fewest offloaded boundaries with which the GPU holds a point, its own not looked at.

        One more than there are where none do.
        """
        few = fewest_offloaded(self._spec, point.resident)
        over = self.gpu(point._replace(offloaded=few)) - room
        step = self._micro * self._boundary
        found = np.minimum(few + np.maximum(-(-over // step), 0), self._layers)
        # The last one spares less: the boundaries in flight remain.
        fits = self.gpu(point._replace(offloaded=found)) <= room
        return np.where(fits, found, self._layers + 1)

    # -- what depends on the resident units alone ------------------------------------------------

    def _gpu_by_resident(self, units: Ints) -> Ints:
        spec, base, chunks = self._spec, self._base, self._chunks
        size, tokens = base.compute.nbytes, base.micro_tokens
        embed, first = units > 0, np.maximum(units - 1, 0)
        head = np.logical_not(spec.tied & embed)
        """Whether the output matrix is streamed."""
        trained_norm, trained_head = not spec.norm.frozen, not spec.head.frozen
        several = chunks.sweep > 1
        part = chunks.largest_part if several else 0
        # Slots of weights and of accumulators.
        visited = self._layers - first + (chunks.sweep * head if several else 0)
        largest = np.maximum(chunks.largest_layer[first], part * head)
        total: Ints = np.minimum(base.window, visited) * aligned(size * largest)
        total += aligned(size * spec.norm.numel)
        total += trained_norm * aligned(base.layer_accumulator * spec.norm.numel)
        layer = base.layer_accumulator * chunks.largest_trained
        total += aligned(max(layer, base.head_accumulator * part * trained_head))
        if several:
            total += self._micro * (aligned(12 * tokens) + aligned(4 * tokens * spec.hidden))
        else:
            total += head * aligned(size * spec.head.numel)
            total += trained_head * aligned(base.head_accumulator * spec.head.numel)
        total += self._adapters_on_gpu()
        if spec.balanced:
            total += aligned(4 * (2 * spec.balanced + 1))
        if base.compute is Compute.FP32:
            total += aligned(
                4 * np.maximum(chunks.largest_loaded[first], chunks.largest_head * head)
            )
        # Gradients on their way down, and those that wait for the others.
        staged = np.minimum(base.staging_slots, chunks.staged(first, head))
        total += staged * aligned(chunks.travelling(chunks.largest_staged(first, head)))
        total += chunks.parked[first] * base.deferred
        # Constants, inputs and results.
        total += sum(aligned(nbytes) for nbytes in self._constants())
        total += sum(aligned(nbytes) for nbytes in self._inputs()) + aligned(4)
        total += embed * sum(aligned(nbytes) for nbytes in self._embed_inputs())
        total += aligned(8 * self._squares_on_gpu(units))
        # What is resident.
        gradients = self._micro * base.micro_tokens * spec.hidden * size
        total += embed * (chunks.at_rest(spec.embed) + aligned(gradients))
        total += chunks.layers_at_rest[0] - chunks.layers_at_rest[first]
        if spec.tied and trained_head:
            total += embed * aligned(size * spec.embed.numel)
        return total + base.workspace + self._request.profile.gpu_overhead

    def _gradients_by_resident(self, units: Ints) -> tuple[Ints, Ints]:
        first = np.maximum(units - 1, 0)
        untied = np.full(len(units), not self._spec.tied)
        largest = self._chunks.largest_staged(first, untied)
        return (
            self._chunks.staged(first, untied),
            aligned(self._chunks.travelling(largest)),
        )

    def _host_by_resident(self, units: Ints) -> Ints:
        spec, base, chunks = self._spec, self._base, self._chunks
        embed, first = units > 0, np.maximum(units - 1, 0)
        streamed = np.logical_not(embed)
        total: Ints = chunks.layers_at_rest[first] + chunks.at_rest(spec.norm)
        total += streamed * chunks.at_rest(spec.embed)
        if not spec.tied:
            total += chunks.at_rest(spec.head)
        elif not spec.head.frozen:
            parked = sum(aligned(chunks.travelling(numel)) for numel in chunks.embed)
            total += streamed * parked
        if base.deferred:
            total += chunks.travelled(first)
        else:
            total += np.minimum(MIN_GRADIENT_SLOTS, self.gradients) * self.gradient
        total += aligned(8 * self._squares(streamed))
        total += sum(aligned(nbytes) for nbytes in self._inputs()) + aligned(4)
        total += embed * sum(aligned(nbytes) for nbytes in self._embed_inputs())
        total += aligned(8 * self._squares_on_gpu(units))
        total += aligned(self._saved(units))
        adapters = [unit for unit in spec.adapters.values() if unit.name not in base.resident]
        total += sum(chunks.at_rest(unit) for unit in adapters)
        return total + self._request.profile.host_overhead

    def _adapters_on_gpu(self) -> int:
        """Bytes of adapters, which are all resident or take turns in two slots of weights."""
        base, adapters = self._base, list(self._spec.adapters.values())
        if not base.resident:
            slots = (adapters[0::2], adapters[1::2])
            largest = [max((unit.numel for unit in each), default=0) for each in slots]
            return sum(aligned(base.compute.nbytes * numel) for numel in largest)
        parked = sum(aligned(base.compute.nbytes * unit.numel) for unit in adapters)
        at_rest = sum(self._chunks.at_rest(unit) for unit in adapters)
        return at_rest + (parked if base.deferred else 0)

    def _saved(self, units: Ints) -> Ints:
        """Bytes through which resident units pass to be saved; under adapters, these alone do."""
        spec = self._spec
        if spec.adapters:
            adapters = [
                4 * u.numel for u in spec.adapters.values() if u.name in self._base.resident
            ]
            return np.full_like(units, max(adapters, default=0))
        nbytes = [0, *(u.numel * (2 if u.frozen else 4) for u in (spec.embed, *spec.layers))]
        return np.maximum.accumulate(nbytes)

    def _squares_on_gpu(self, units: Ints) -> Ints:
        """Sums of squares of gradients that the GPU takes."""
        spec = self._spec
        rows = 0 if spec.embed.frozen else 1 + (spec.tied or not self._base.deferred)
        updates: Ints = self._chunks.trained_before[np.maximum(units - 1, 0)]
        return updates + len(self._base.resident) + rows * (units > 0)

    def _squares(self, streamed_embed: Ints) -> Ints:
        """Sums of squares that the CPU takes; deferred, those of chunks travel with them."""
        spec, deferred = self._spec, self._base.deferred
        chunks = len(self._chunks.embed) if spec.tied or not deferred else 0
        rows = 0 if spec.embed.frozen else chunks + 1
        return (0 if deferred else 1) * self.gradients + rows * streamed_embed

    def _constants(self) -> list[int]:
        spec, base, seq_len = self._spec, self._base, self._base.seq_len
        windows = [] if base.packed else [w for w in spec.windows if w < seq_len]
        return [8 * spec.ropes * seq_len * spec.rotary_dim, *(seq_len * seq_len for _ in windows)]

    def _inputs(self) -> list[int]:
        base = self._base
        documents = [4 * (2 * base.tokens + base.micro_batches)] if base.packed else []
        return [8 * base.tokens, *documents]

    def _embed_inputs(self) -> list[int]:
        tokens = self._base.tokens
        index = [] if self._spec.embed.frozen else [8 * (3 * tokens + self._spec.vocab + 3)]
        return [8 * tokens, *index]
