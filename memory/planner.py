"""Choose a memory plan: the fastest placement that fits the budgets, or say what would fit.

Candidates are micro-batch × vocabulary chunks × window, ranked by a bound on the compute lane; the
first that fits is taken, with as few boundaries offloaded as the GPU budget allows and as many
parked gradients as the host budget allows. Everything is computed before anything is allocated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from slideformer.graph.buffers import HOST_TIERS, Tier
from slideformer.graph.errors import BudgetError
from slideformer.graph.graph import TaskGraph
from slideformer.graph.model import ModelSpec
from slideformer.graph.plan import Budgets, Compute, MachineProfile, MemoryPlan, forward_flops
from slideformer.graph.step import compile_evaluation, compile_save, compile_step, footprint
from slideformer.memory.layout import lay_out

CHUNK_NUMEL = 32 << 20
"""Elements of a chunk: 64 MiB in BF16, large enough for full PCIe speed."""

HEAD_TILE = 4096
"""Tokens per tile of logits; smaller tiles spend more time adding up the matrix's gradient."""

STAGING_SLOTS = 4
SPARE_BOUNDARIES = 2
"""Boundary slots beyond what the program needs at once, so that copies run ahead and behind."""

WORTHWHILE = 0.002
"""Share of a step that more GPU memory must save to be used; ties go to less memory."""

_KEPT_OPTIONS = 6

MIN_GRADIENT_SLOTS = 2
_WINDOWS = (3, 2)


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
    ``micro_rows`` and ``window`` fix what is otherwise chosen.
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
    window: int | None = None


def make_plan(request: PlanRequest) -> MemoryPlan:
    """The plan for ``request``; raises `BudgetError` with the least budgets that would work."""
    for candidate in sorted(_candidates(request), key=lambda p: _bound(request, p)):
        placed = _place(request, candidate)
        if placed is not None:
            return _spend_gpu(request, _assign_gradients(request, placed))
    raise _refusal(request)


def plan_graphs(spec: ModelSpec, plan: MemoryPlan) -> tuple[TaskGraph, TaskGraph, TaskGraph]:
    """The graphs of a run: train, evaluate, save."""
    return compile_step(spec, plan), compile_evaluation(spec, plan), compile_save(spec, plan)


def peaks(request: PlanRequest, plan: MemoryPlan) -> dict[Tier, int]:
    """Predicted peak bytes per tier; ``cpu`` includes the interpreter, ``gpu`` context and workspace."""
    sizes = {Tier.GPU: 0, Tier.PINNED: 0, Tier.CPU: 0, **lay_out(footprint(request.spec, plan)).sizes}
    sizes[Tier.GPU] += plan.workspace + request.profile.gpu_overhead
    sizes[Tier.CPU] += request.profile.host_overhead
    return sizes


def host_bytes(sizes: Mapping[Tier, int]) -> int:
    """Bytes of all tiers that lie in host memory."""
    return sum(size for tier, size in sizes.items() if tier in HOST_TIERS)


def _candidates(request: PlanRequest) -> Iterator[MemoryPlan]:
    rows = request.rows
    divisors = [d for d in range(1, rows + 1) if rows % d == 0]
    micro = [request.micro_rows] if request.micro_rows else divisors
    windows = [request.window] if request.window else _WINDOWS
    largest_layer = max(unit.numel for unit in request.spec.layers)
    ratio = -(-request.spec.head.numel // largest_layer)
    for micro_rows in micro:
        for vocab_chunks in sorted({1, ratio, 2 * ratio}):
            for window in windows:
                tile = min(HEAD_TILE, micro_rows * request.seq_len)
                vocab_rows = -(-request.spec.vocab // vocab_chunks)
                yield MemoryPlan(
                    compute=request.compute,
                    rows=rows,
                    seq_len=request.seq_len,
                    micro_rows=micro_rows,
                    vocab_chunks=vocab_chunks,
                    head_tile=tile,
                    window=window,
                    chunk_numel=CHUNK_NUMEL,
                    offloaded=len(request.spec.layers),
                    staging_slots=STAGING_SLOTS,
                    workspace=request.workspace(micro_rows, vocab_rows, tile),
                )


def _bound(request: PlanRequest, plan: MemoryPlan) -> float:
    """Seconds of the compute lane: work over rate, small micro-batches being less efficient."""
    spec = request.spec
    layer = forward_flops(spec, spec.layers[0], plan.rows, plan.seq_len)
    head = 2 * spec.head.matrix_numel * plan.tokens
    products = 3 if plan.vocab_chunks == 1 else 4
    flops = 4 * layer * len(spec.layers) + products * head
    # A micro-batch of T tokens reaches about T/(T + 512) of the rate; measured on decoder layers.
    efficiency = plan.micro_tokens / (plan.micro_tokens + 512)
    narrow = 1.005 if plan.window < max(_WINDOWS) else 1.0
    return flops / request.profile.flops / efficiency * narrow


def _place(request: PlanRequest, plan: MemoryPlan) -> MemoryPlan | None:
    """Fewest offloaded boundaries that fit the GPU, if the host has room for them."""
    if _gpu_bytes(request, plan) > request.budgets.gpu:
        return None
    layers = plan.offloaded
    kept = _last(
        layers,
        lambda n: _gpu_bytes(request, replace(plan, offloaded=layers - n)) <= request.budgets.gpu,
    )
    placed = _with_boundaries(request, replace(plan, offloaded=layers - kept))
    return placed if _least_host(request, placed) <= request.budgets.host else None


def _with_boundaries(request: PlanRequest, plan: MemoryPlan) -> MemoryPlan:
    """Size the boundary pool to what the program needs at once, and a few to spare."""
    pool = [name for name in footprint(request.spec, plan.draft()) if name.startswith("x.")]
    return replace(plan, boundary_slots=len(pool) + SPARE_BOUNDARIES)


def _gpu_bytes(request: PlanRequest, plan: MemoryPlan) -> int:
    return peaks(request, _with_boundaries(request, plan))[Tier.GPU]


def _least_host(request: PlanRequest, plan: MemoryPlan) -> int:
    """Host bytes with the fewest gradient slots."""
    spread = [
        size for name, (_, size) in footprint(request.spec, plan).items() if _is_gradient(name)
    ]
    least = MIN_GRADIENT_SLOTS * max(spread, default=0)
    return host_bytes(peaks(request, plan)) - sum(spread) + least


def _is_gradient(place: str) -> bool:
    """Whether a place holds a gradient that may share it with others."""
    return place.startswith("gh.")


def _assign_gradients(request: PlanRequest, plan: MemoryPlan) -> MemoryPlan:
    """Park as many gradients at once as the host budget allows.

    Each chunk takes, in program order, the slot that the simulated step frees first.
    """
    graph = compile_step(request.spec, plan)
    gradients = [b for b in graph.buffers.values() if _is_gradient(b.name)]  # in program order
    largest = max((b.nbytes for b in gradients), default=1)
    room = request.budgets.host - _least_host(request, plan)
    count = min(len(gradients), MIN_GRADIENT_SLOTS + room // largest)
    prediction = request.predict(graph)
    free = [0.0] * count
    slots: list[int] = []
    for gradient in gradients:
        slot = min(range(count), key=lambda s: free[s])
        slots.append(slot)
        free[slot] = prediction.stops[gradient.name.replace("gh.", "update.", 1)]
    plan = replace(plan, gradient_slots=count, gradient_slot=tuple(slots))
    seconds = request.predict(compile_step(request.spec, plan)).seconds
    return replace(plan, peaks=peaks(request, plan), step_seconds=seconds)


def _spend_gpu(request: PlanRequest, plan: MemoryPlan) -> MemoryPlan:
    """Use what is left of the GPU budget where it shortens the step most.

    Resident units spare the CPU their updates and PCIe their weights; kept projections spare the
    GPU a part of its recompute. For some numbers of layers that keep theirs, the rest goes to
    resident units; the fastest simulated step wins, with as few resident units as it needs.
    """
    layers = len(request.spec.layers)
    # The embedding is due first in a step and ready last, and so on with the first layers.
    order = ["embed", *(unit.name for unit in request.spec.layers)]
    if plan.compute is not Compute.BF16:  # FP32 weights would have to be joined anew all the time
        order = []

    def spent(kept: int, resident: int) -> MemoryPlan:
        units = frozenset(order[:resident])
        wanted = replace(plan, kept=kept, resident=units, gradient_slots=0, gradient_slot=())
        return _with_boundaries(request, wanted)

    def fits(kept: int, resident: int) -> bool:
        return peaks(request, spent(kept, resident))[Tier.GPU] <= request.budgets.gpu

    def seconds(kept: int, resident: int) -> float:
        return _assign_gradients(request, spent(kept, resident)).step_seconds

    most = _last(layers, lambda kept: fits(kept, 0))
    options = []
    for kept in sorted({most * part // _KEPT_OPTIONS for part in range(_KEPT_OPTIONS + 1)}):
        resident = _last(len(order), lambda n, kept=kept: fits(kept, n))  # type: ignore[misc]
        options.append((seconds(kept, resident), kept, resident))
    best, kept, resident = min(options)
    if best > plan.step_seconds * (1 - WORTHWHILE):
        return plan
    enough = best * (1 + WORTHWHILE)
    spared = _last(resident, lambda n: seconds(kept, resident - n) <= enough)
    return _assign_gradients(request, spent(kept, resident - spared))


def _last(limit: int, holds: Callable[[int], bool]) -> int:
    """The largest number up to ``limit`` for which ``holds``, if it holds up to there and 0 counts."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        if holds(middle):
            low = middle
        else:
            high = middle - 1
    return low


def _refusal(request: PlanRequest) -> BudgetError:
    """The error that names the least GPU and the least host budget, the other one as it is."""
    gpu: list[int] = []
    host: list[int] = []
    budgets = request.budgets
    for candidate in _candidates(request):
        placed = _with_boundaries(request, candidate)
        needs_gpu, needs_host = peaks(request, placed)[Tier.GPU], _least_host(request, placed)
        if needs_host <= budgets.host:
            gpu.append(needs_gpu)
        if needs_gpu <= budgets.gpu:
            host.append(needs_host)
    ways = []
    if gpu:
        ways.append(f"--gpu-memory {_mib(min(gpu))}MiB")
    if host:
        ways.append(f"--cpu-memory {_mib(min(host))}MiB")
    if not ways:
        every = [_with_boundaries(request, c) for c in _candidates(request)]
        least = min(every, key=lambda p: peaks(request, p)[Tier.GPU])
        both = _mib(peaks(request, least)[Tier.GPU]), _mib(_least_host(request, least))
        ways.append(f"--gpu-memory {both[0]}MiB with --cpu-memory {both[1]}MiB")
    return BudgetError(
        f"no plan fits {_mib(budgets.gpu, up=False)} MiB of GPU memory and "
        f"{_mib(budgets.host, up=False)} MiB of host memory for {request.rows} rows of "
        f"{request.seq_len} tokens; the least that works is {' or '.join(ways)}. "
        "A smaller --batch-size or --seq-len needs less"
    )


def _mib(nbytes: int, *, up: bool = True) -> int:
    return -(-nbytes // (1 << 20)) if up else nbytes >> 20
