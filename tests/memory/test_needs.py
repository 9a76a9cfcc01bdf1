"""The closed forms of what plans need equal the places of their compiled graphs, byte for byte."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from slideformer.graph.buffers import Tier, host_bytes
from slideformer.graph.plan import MemoryPlan
from slideformer.graph.step import footprint
from slideformer.graph.tasks import TaskKind
from slideformer.memory.lattice import (
    Counts,
    bases,
    boundaries_for_nvme,
    fewest_offloaded,
    plan_at,
    points,
    resident_units,
)
from slideformer.memory.layout import lay_out, places
from slideformer.memory.needs import MIN_GRADIENT_SLOTS, Needs, peaks
from slideformer.memory.nvme_needs import Chain, StateSizes
from slideformer.memory.planner import plan_graphs
from slideformer.memory.request import PlanRequest
from tests.support.requests import PROFILE, requests

Case = tuple[PlanRequest, MemoryPlan, Counts]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A request, a base of its lattice with odd sizes, and any point there."""
    request = draw(requests())
    base = draw(st.sampled_from(list(bases(request))))
    base = replace(
        base,
        chunk_numel=-(-max(u.numel for u in request.spec.units) // draw(st.integers(1, 5))),
        staging_slots=draw(st.integers(1, 5)),
        nvme_slots=draw(st.integers(1, 5)),
        nvme_direct=draw(st.booleans()),
    )
    return request, base, draw(any_point(request))


@st.composite
def any_point(draw: st.DrawFn, request: PlanRequest) -> Counts:
    """A point of the lattice, with any number of boundaries and of layers' state moved away."""
    spec, every = request.spec, points(request.spec, request.compute)
    point = every.at(draw(st.integers(0, len(every.kept) - 1)))
    few = int(fewest_offloaded(spec, point.resident))
    point = point._replace(offloaded=np.array(draw(st.integers(few, len(spec.layers)))))
    base = next(bases(request))
    steps = chain_of(request, base, point).steps + int(boundaries_for_nvme(spec, point))
    return point._replace(stored=np.array(draw(st.integers(0, steps))))


def chain_of(request: PlanRequest, base: MemoryPlan, point: Counts) -> Chain:
    """What can go to NVMe, and in which order."""
    resident = resident_units(request.spec, int(point.resident))
    return Chain(request.spec, base, StateSizes(request.spec, base, resident))


@settings(max_examples=60)
@given(cases(), st.integers(1, 9))
def test_closed_forms_equal_the_places_of_the_graphs(case: Case, slots: int) -> None:
    request, base, point = case
    needs, chain = Needs(request, base), chain_of(request, base, point)
    stored = chain.stored(point.stored, boundaries_for_nvme(request.spec, point))
    gain = chain.sizes(stored)
    plan = plan_at(request.spec, base, point, stored)
    parked = sum(name.startswith("gh.") for name in footprint(request.spec, plan))
    assert parked == int(needs.gradients[point.resident])
    plan = replace(plan, boundary_slots=int(needs.boundary_slots(point)))
    every = replace(plan, gradient_slots=parked, gradient_slot=tuple(range(parked)))
    # In one slot, all take as much as the largest.
    one = replace(plan, gradient_slots=1, gradient_slot=(0,) * parked)
    sizes = peaks(request, every if plan.deferred or not parked else one)
    least = min(MIN_GRADIENT_SLOTS, parked)
    gradient = int(needs.gradient[point.resident])
    host = int(needs.host(point)) - int(gain.spared)
    assert sizes[Tier.GPU] == int(needs.gpu(point))
    assert host_bytes(sizes) == host - (0 if plan.deferred else max(least - 1, 0) * gradient)
    assert sizes.get(Tier.NVME, 0) == int(gain.nbytes)
    graphs = plan_graphs(request.spec, every)
    assert lay_out(places(graphs)).sizes[Tier.GPU] == (
        sizes[Tier.GPU] - plan.workspace - PROFILE.gpu_overhead
    )
    written, read = (
        sum(t.cost.nbytes for t in graphs[0].tasks if t.kind is kind)
        for kind in (TaskKind.NVME_WRITE, TaskKind.NVME_READ)
    )
    assert written == gain.nbytes
    assert written <= read <= gain.read, "some weights need not come up again for backward"
    if parked and not plan.deferred:  # in several, some may get by with less
        count = max(least, min(slots, parked))
        taken = tuple(i % count for i in range(parked))
        several = replace(plan, gradient_slots=count, gradient_slot=taken)
        assert host_bytes(peaks(request, several)) <= host + (count - least) * gradient


@given(cases(), st.data())
def test_the_fewest_offloaded_are_the_first_that_fit(case: Case, data: st.DataObject) -> None:
    request, base, point = case
    needs, layers = Needs(request, base), len(request.spec.layers)
    counts = range(int(fewest_offloaded(request.spec, point.resident)), layers + 1)
    gpu = [int(needs.gpu(point._replace(offloaded=np.array(n)))) for n in counts]
    room = data.draw(st.sampled_from(gpu)) + data.draw(st.sampled_from([-1, 0, 1, 10_000]))
    first = next((n for n, need in zip(counts, gpu, strict=True) if need <= room), layers + 1)
    assert needs.fewest_offloaded(point, room) == first


@given(cases(), st.data())
def test_the_fewest_steps_to_nvme_are_the_first_that_spare_enough(
    case: Case, data: st.DataObject
) -> None:
    request, _, point = case
    chain, boundaries = chain_of(*case), boundaries_for_nvme(request.spec, point)
    steps = range(chain.steps + int(boundaries) + 1)
    gains = [chain.sizes(chain.stored(np.array(n), boundaries)) for n in steps]
    spared, nbytes = [int(gain.spared) for gain in gains], [int(gain.nbytes) for gain in gains]
    assert all(one < two for one, two in pairwise(nbytes)), "each step takes more"
    wanted = max(1, data.draw(st.sampled_from(spared)) + data.draw(st.integers(-1, 1)))
    room = data.draw(st.sampled_from(nbytes)) + data.draw(st.integers(-1, 1))
    fits = [n for n in steps if nbytes[n] <= room]
    first = next((n for n in fits if spared[n] >= wanted), -1)
    assert chain.fewest(np.array([wanted]), np.array([boundaries]), room) == first
    assert chain.most_spared(boundaries, room) == max((spared[n] for n in fits), default=0)
