"""What a plan needs: the request it answers, and the bytes it takes in each tier."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from slideformer.graph.buffers import HOST_TIERS, Tier
from slideformer.graph.graph import TaskGraph
from slideformer.graph.model import ModelSpec
from slideformer.graph.plan import Budgets, Compute, MachineProfile, MemoryPlan
from slideformer.graph.step import footprint
from slideformer.memory.layout import aligned, lay_out

SPARE_BOUNDARIES = 2
"""Boundary slots beyond what the program needs at once, so that copies run ahead and behind."""

SPARE_WHEN_SPILLING = 6
"""The same while spilled activations keep the copies of boundaries waiting."""

MIN_GRADIENT_SLOTS = 2


@dataclass(frozen=True, slots=True)
class Prediction:
    """A simulated step: its duration, and when each of its tasks stops, in seconds."""

    seconds: float
    stops: Mapping[str, float]


@dataclass(frozen=True)
class PlanRequest:
    """What a plan is wanted for.

    ``workspace`` gives the bytes of GPU temporaries of (micro-batch rows, rows of a vocabulary
    chunk, tokens of a head tile); ``predict`` simulates a step under the policy that will run it.
    ``micro_rows``, ``vocab_chunks``, ``head_tile`` and ``window`` fix what is otherwise chosen;
    ``packed`` and ``deferred`` are those of the plan.
    """

    spec: ModelSpec
    rows: int
    seq_len: int
    compute: Compute
    budgets: Budgets
    profile: MachineProfile
    workspace: Callable[[int, int, int], int]
    predict: Callable[[TaskGraph], Prediction]
    micro_rows: int | None = None
    vocab_chunks: int | None = None
    head_tile: int | None = None
    window: int | None = None
    packed: bool = False
    deferred: bool = False


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a plan needs: GPU and host bytes, overheads included, and boundary slots.

    ``host`` counts the fewest gradient slots, ``gradient`` bytes each, out of ``gradients`` that
    could be parked at once; deferred, all of them.
    """

    gpu: int
    host: int
    boundaries: int
    gradient: int
    gradients: int


def peaks(request: PlanRequest, plan: MemoryPlan) -> dict[Tier, int]:
    """Predicted peak bytes per tier, the interpreter's, the context's and workspace included."""
    sizes = {
        Tier.GPU: 0,
        Tier.PINNED: 0,
        Tier.CPU: 0,
        **lay_out(footprint(request.spec, plan)).sizes,
    }
    sizes[Tier.GPU] += plan.workspace + request.profile.gpu_overhead
    sizes[Tier.CPU] += request.profile.host_overhead
    return sizes


def host_bytes(sizes: Mapping[Tier, int]) -> int:
    """Bytes of all tiers that lie in host memory."""
    return sum(size for tier, size in sizes.items() if tier in HOST_TIERS)


def measure(request: PlanRequest, plan: MemoryPlan) -> Sizes:
    """The needs of a plan whose boundary and gradient slots are still to be counted."""
    draft = plan.draft()
    places = footprint(request.spec, draft)
    boundaries = [aligned(n) for name, (_, n) in places.items() if name.startswith("x.")]
    gradients = [aligned(n) for name, (_, n) in places.items() if is_gradient(name)]
    largest = max(gradients, default=0)
    spare = SPARE_WHEN_SPILLING if plan.spilled else SPARE_BOUNDARIES
    sizes = peaks(request, draft)
    fewest = min(MIN_GRADIENT_SLOTS, len(gradients)) * largest
    return Sizes(
        gpu=sizes[Tier.GPU] + spare * max(boundaries),
        host=host_bytes(sizes) - (0 if plan.deferred else sum(gradients) - fewest),
        boundaries=len(boundaries) + spare,
        gradient=largest,
        gradients=len(gradients),
    )


def is_gradient(place: str) -> bool:
    """Whether a place holds a gradient that may share it with others."""
    return place.startswith("gh.")
