"""The fastest plan of the lattice that fits, found exactly, and the least budgets that would do.

The axes that are searched in full are evaluated as arrays, base by base; for each of their points
the fewest boundaries and the least state that must leave a tier follow in closed form. Bases that
cannot win are left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from operator import attrgetter

import numpy as np
from numpy.typing import NDArray

from slideformer.graph.plan import UNLIMITED, Budgets, MemoryPlan
from slideformer.graph.tasks import Lane
from slideformer.memory.bound import Bound, Seconds
from slideformer.memory.lattice import (
    Counts,
    bases,
    boundaries_for_nvme,
    fewest_offloaded,
    plan_at,
    points,
    resident_units,
)
from slideformer.memory.layout import Ints
from slideformer.memory.needs import Needs
from slideformer.memory.nvme_needs import Chain, Sizes, StateSizes, Stored, nvme_room
from slideformer.memory.request import PlanRequest
from slideformer.memory.unit_sizes import Chunks

GRID = 0.01
"""Relative distance of what is told apart: less time does not pay for more memory."""

NEAR = 0.03
"""Relative error of the bound: plans this near to the best may be faster when simulated."""


@dataclass(frozen=True)
class Solution:
    """The plan chosen, without gradient slots, and how it compares.

    Of two solutions the better one has the lower ``rank``: time and bytes on NVMe, both on the
    `GRID`; micro-batches and chunks, with which grows what the bound leaves out; bytes of memory if
    nothing were moved to another tier; offloaded boundaries. ``seconds`` is its bound, ``work`` are
    those of each lane, and ``nvme`` bytes are on NVMe. ``spare_host`` bytes of the host's budget
    are left over, and ``gradients`` in slots of ``gradient`` bytes could be parked at once.
    """

    plan: MemoryPlan
    seconds: float
    work: Mapping[Lane, float]
    rank: tuple[int, ...]
    nvme: int
    spare_host: int
    gradients: int
    gradient: int


def on_grid(values: Seconds | Ints) -> Ints:
    """Which point of a logarithmic grid each value falls on; of times, this is the objective."""
    found: Ints = np.floor(np.log(values) / math.log1p(GRID)).astype(np.int64)
    return found


class Lattice:
    """All plans for a request, whatever its budgets; the methods filter them by budgets."""

    def __init__(self, request: PlanRequest) -> None:
        self._spec = request.spec
        self._all = points(request.spec, request.compute)
        # What is kept takes memory and spares none, so the least is needed where nothing is.
        self._least = self._all.at((self._all.kept == 0) & (self._all.spilled == 0))
        states: dict[tuple[int, int], StateSizes] = {}
        chunks: dict[tuple[int, int], Chunks] = {}
        self._bases = sorted(
            (_Base(request, plan, states, chunks) for plan in bases(request)),
            key=lambda base: base.least,
        )

    def solve(self, budgets: Budgets) -> Solution | None:
        """The best plan within ``budgets``, or None if there is none."""
        best: Solution | None = None
        for base in self._bases:
            if best is not None and int(on_grid(np.array(base.least))) > best.rank[0]:
                break
            found = self._best_on(base, budgets)
            if found is not None and (best is None or found.rank < best.rank):
                best = found
        return best

    def fastest(self, budgets: Budgets) -> float:
        """The least bound of all plans within ``budgets``, infinite if there is none."""
        least = math.inf
        for base in self._bases:
            if base.least >= least:
                break
            least = min(least, self._fitting(base, budgets).seconds.min(initial=math.inf))
        return least

    def work(self, plan: MemoryPlan) -> tuple[float, dict[Lane, float]]:
        """The bound of one of the lattice's plans, and the seconds of each lane."""
        key = attrgetter("micro_rows", "vocab_chunks", "window", "chunk_numel")
        base = next(base for base in self._bases if key(base.plan) == key(plan))
        resident = len(plan.resident - base.plan.resident)
        counts = np.array([resident, plan.kept, plan.spilled, plan.offloaded, 0])
        stored = np.array([plan.nvme_moments, plan.nvme_lo, plan.nvme_boundaries, plan.nvme_hi])
        point, sizes = Counts(*counts), base.chain(resident).sizes(Stored(*stored))
        work = {lane: float(each) for lane, each in base.bound.work(point, sizes).items()}
        return float(base.bound.seconds(point, sizes)), work

    def contenders(self, budgets: Budgets, best: Solution, count: int) -> list[Solution]:
        """``best`` and the plans that come next to it, ``count`` at most and all of them `NEAR` it.

        None has more on NVMe. Of plans with the same units resident and as many layers spilled, on
        one base, only the one that keeps most is among them, and of two that differ in the size of
        chunks the one with fewer.
        """
        alike = attrgetter("micro_rows", "vocab_chunks", "window", "resident", "kept", "spilled")
        near: dict[tuple[object, ...], Solution] = {}
        for base in self._bases:
            if base.least <= best.seconds * (1 + NEAR):
                for found in self._near_on(base, budgets, best):
                    other = near.setdefault(alike(found.plan), found)
                    if found.plan.chunk_numel > other.plan.chunk_numel:
                        near[alike(found.plan)] = found
        others = sorted((s for s in near.values() if s.plan != best.plan), key=lambda s: s.seconds)
        return [best, *others[: count - 1]]

    def least_gpu(self, budgets: Budgets) -> int | None:
        """The least bytes of GPU memory that would do with the other budgets as they are."""
        found: list[int] = []
        for base in self._bases:
            point = self._least._replace(offloaded=self._most_offloaded(base, budgets))
            found += _least(base.needs.gpu(point.at(point.offloaded >= 0)))
        return min(found, default=None)

    def least_host(self, budgets: Budgets) -> int | None:
        """The least bytes of host memory that would do with the other budgets as they are."""
        found: list[int] = []
        for base in self._bases:
            point, need = self._within_gpu(base, budgets, self._least)
            found += _least(need - base.most_spared(point, nvme_room(budgets)))
        return min(found, default=None)

    def least_nvme(self, budgets: Budgets) -> int | None:
        """The least bytes of NVMe, to hold and to write, that would do with the other budgets."""
        found: list[int] = []
        for base in self._bases:
            point, need = self._within_gpu(base, budgets, self._least)
            stored = base.fewest_stored(point, need - budgets.host, UNLIMITED)
            possible = point._replace(stored=stored).at(stored >= 0)
            found += _least(base.on_nvme(possible).nbytes)
        return min(found, default=None)

    def _best_on(self, base: _Base, budgets: Budgets) -> Solution | None:
        fitting = self._fitting(base, budgets)
        if not len(fitting.seconds):
            return None
        left: NDArray[np.bool_] = np.ones(len(fitting.seconds), bool)
        for key in fitting.keys:
            left &= key == key[left].min()
        return fitting.solution(int(np.argmax(left)))

    def _near_on(self, base: _Base, budgets: Budgets, best: Solution) -> list[Solution]:
        fitting = self._fitting(base, budgets)
        point, near = fitting.point, fitting.seconds <= best.seconds * (1 + NEAR)
        near &= fitting.sizes.nbytes <= best.nvme
        most: dict[tuple[int, int], int] = {}
        for at in np.flatnonzero(near):
            group = int(point.resident[at]), int(point.spilled[at])
            if group not in most or point.kept[at] > point.kept[most[group]]:
                most[group] = int(at)
        return [fitting.solution(at) for at in most.values()]

    def _fitting(self, base: _Base, budgets: Budgets) -> _Fitting:
        """The points on a base that fit."""
        point, need = self._within_gpu(base, budgets, self._all)
        stored = base.fewest_stored(point, need - budgets.host, nvme_room(budgets))
        fits = stored >= 0
        point, need = point._replace(stored=stored).at(fits), need[fits]
        sizes = base.on_nvme(point)
        return _Fitting(
            base=base,
            point=point,
            sizes=sizes,
            seconds=base.bound.seconds(point, sizes),
            few=point._replace(offloaded=fewest_offloaded(self._spec, point.resident)),
            spare_host=budgets.host - need + sizes.spared,
        )

    def _within_gpu(self, base: _Base, budgets: Budgets, among: Counts) -> tuple[Counts, Ints]:
        """The points that the GPU holds with the fewest boundaries offloaded, and their host bytes.

        Without a GPU its tier is part of the host's memory, and offloading would spare nothing.
        """
        needs = base.needs
        if budgets.gpu is None:
            few = among._replace(offloaded=fewest_offloaded(self._spec, among.resident))
            return few, needs.host(few) + needs.gpu(few)
        layers = len(self._spec.layers)
        # With nothing kept and all offloaded, the resident units alone rule most points out.
        units = np.arange(int(self._all.resident[-1]) + 1)
        none = np.zeros_like(units)
        least = needs.gpu(Counts(units, none, none, none + layers, none))
        point = among.of_residents(least <= budgets.gpu)
        point = point._replace(offloaded=needs.fewest_offloaded(point, budgets.gpu))
        point = point.at(point.offloaded <= layers)
        return point, needs.host(point)

    def _most_offloaded(self, base: _Base, budgets: Budgets) -> Ints:
        """The most boundaries for which the host has room where nothing is kept, or -1.

        Offloading one more never lowers what the host needs, with or without NVMe.
        """
        room = nvme_room(budgets)

        def fits(offloaded: Ints) -> NDArray[np.bool_]:
            point = self._least._replace(offloaded=offloaded)
            return base.needs.host(point) - base.most_spared(point, room) <= budgets.host

        fewest = low = fewest_offloaded(self._spec, self._least.resident)
        high = np.full_like(low, len(self._spec.layers))
        possible = fits(low)
        while (low < high).any():
            middle = (low + high + 1) // 2
            enough = fits(middle)
            low, high = np.where(enough, middle, low), np.where(enough, high, middle - 1)
            low = np.minimum(low, np.maximum(high, fewest))
            high = np.maximum(high, low)
        return np.where(possible, low, -1)


@dataclass(frozen=True)
class _Fitting:
    """The points on a base that fit, with their bounds; ``few`` offload what they must anyway."""

    base: _Base
    point: Counts
    sizes: Sizes
    seconds: Seconds
    few: Counts
    spare_host: Ints

    @cached_property
    def keys(self) -> tuple[Ints, Ints, Ints, Ints]:
        """What ranks them, micro-batches and chunks aside."""
        stored = on_grid(np.maximum(self.sizes.nbytes, 1))
        memory = self.base.needs.gpu(self.few) + self.base.needs.host(self.few)
        return on_grid(self.seconds), stored, memory, self.point.offloaded

    def solution(self, at: int) -> Solution:
        """One of them."""
        base, chosen, sizes = self.base, self.point.at(at), self.sizes.at(at)
        needs, work = base.needs, base.bound.work(chosen, sizes)
        time, stored, *rest = (int(key[at]) for key in self.keys)
        slots = int(needs.boundary_slots(chosen))
        return Solution(
            plan=replace(base.plan_at(chosen), boundary_slots=slots),
            seconds=float(self.seconds[at]),
            work={lane: float(seconds) for lane, seconds in work.items()},
            rank=(time, stored, base.plan.micro_batches, -base.plan.chunk_numel, *rest),
            nvme=int(sizes.nbytes),
            spare_host=int(self.spare_host[at]),
            gradients=int(needs.gradients[chosen.resident]),
            gradient=int(needs.gradient[chosen.resident]),
        )


class _Base:
    """A base, and what is known of plans on it."""

    def __init__(
        self,
        request: PlanRequest,
        plan: MemoryPlan,
        states: dict[tuple[int, int], StateSizes],
        chunks: dict[tuple[int, int], Chunks],
    ) -> None:
        self._request, self._spec = request, request.spec
        self._states, self._chunks = states, chunks  # shared with the others
        self.plan = plan
        self.bound = Bound(request.spec, plan, request.profile)
        self.least = self.bound.least()

    @cached_property
    def needs(self) -> Needs:
        """What its plans take."""
        key = self.plan.vocab_chunks, self.plan.chunk_numel
        if key not in self._chunks:
            self._chunks[key] = Chunks(self._spec, self.plan)
        return Needs(self._request, self.plan, self._chunks[key])

    def plan_at(self, point: Counts) -> MemoryPlan:
        """The plan at one point."""
        boundaries = boundaries_for_nvme(self._spec, point)
        stored = self.chain(int(point.resident)).stored(point.stored, boundaries)
        return plan_at(self._spec, self.plan, point, stored)

    def fewest_stored(self, point: Counts, missing: Ints, room: int) -> Ints:
        """The fewest steps to NVMe that spare each point the host bytes ``missing``, or -1."""
        found = np.where(missing <= 0, 0, -1)
        boundaries = boundaries_for_nvme(self._spec, point)
        for chain, here in self._by_chain(point, (missing > 0) & (room > 0)):
            found[here] = chain.fewest(missing[here], boundaries[here], room)
        return found

    def on_nvme(self, point: Counts) -> Sizes:
        """What each point gains by its steps."""
        found = Sizes(*np.zeros((len(Sizes._fields), len(point.stored)), np.int64))
        boundaries = boundaries_for_nvme(self._spec, point)
        for chain, here in self._by_chain(point, point.stored > 0):
            sizes = chain.sizes(chain.stored(point.stored[here], boundaries[here]))
            for into, each in zip(found, sizes, strict=True):
                into[here] = each
        return found

    def most_spared(self, point: Counts, room: int) -> Ints:
        """The most bytes of host memory that NVMe can spare each point."""
        found = np.zeros_like(point.resident)
        boundaries = boundaries_for_nvme(self._spec, point)
        for chain, here in self._by_chain(point, np.full(len(found), room > 0)):
            found[here] = chain.most_spared(boundaries[here], room)
        return found

    def _by_chain(
        self, point: Counts, wanted: NDArray[np.bool_]
    ) -> Iterator[tuple[Chain, NDArray[np.bool_]]]:
        """Chains and the points among those ``wanted`` that they are for."""
        for resident in np.unique(point.resident[wanted]):
            yield self.chain(int(resident)), wanted & (point.resident == resident)

    def chain(self, resident: int) -> Chain:
        """The chain of its plans with so many units resident."""
        key = resident, self.plan.chunk_numel
        if key not in self._states:
            units = resident_units(self._spec, resident)
            self._states[key] = StateSizes(self._spec, self.plan, units)
        return Chain(self._spec, self.plan, self._states[key])


def _least(values: Ints) -> list[int]:
    """The smallest value, if there is one."""
    return [int(values.min())] if len(values) else []
