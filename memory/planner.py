"""Choose a memory plan: the fastest placement that fits the budgets, or say what would fit.

Micro-batch, vocabulary chunks and window make a base; what a base leaves of the GPU and host
budgets buys resident units (which spare the CPU their updates and PCIe their weights) and kept or
spilled activations (which spare the GPU a part of its recompute). Candidates are ranked by the
bound of ``bound.py``; the best one is measured exactly, given gradient slots from a simulated step,
and simulated. Everything is computed before anything is allocated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from slideformer.graph.errors import BudgetError
from slideformer.graph.graph import TaskGraph
from slideformer.graph.model import ModelSpec, UnitSpec
from slideformer.graph.plan import Compute, MemoryPlan, kept_nbytes
from slideformer.graph.step import (
    compile_checkpoint,
    compile_evaluation,
    compile_save,
    compile_step,
)
from slideformer.graph.step_activations import SPILL_SLOTS
from slideformer.graph.step_memory import state_nbytes
from slideformer.memory.bound import step_bound
from slideformer.memory.needs import (
    MIN_GRADIENT_SLOTS,
    PlanRequest,
    Sizes,
    is_gradient,
    measure,
    peaks,
)
from slideformer.memory.nvme_needs import (
    less_on_nvme,
    more_on_nvme,
    most_on_nvme,
    nvme_nbytes,
    nvme_room,
    relieve,
)

CHUNK_NUMEL = 32 << 20
"""Elements of a chunk: 64 MiB in BF16, large enough for full PCIe speed."""

MAX_LAYER_CHUNKS = 8
"""Chunks of a layer; more would add tasks and overlap nothing that these do not."""

HEAD_TILE = 4096
"""Tokens per tile of logits; smaller tiles spend more time adding up the matrix's gradient."""

MIN_STAGING_SLOTS = 4

WORTHWHILE = 0.002
"""Share of a step that more memory must save to be used; ties go to less memory."""

_WINDOWS = (3, 2)


def make_plan(request: PlanRequest) -> MemoryPlan:
    """The plan for ``request``; raises `BudgetError` with the least budgets that would work."""
    options: list[tuple[float, int, MemoryPlan]] = []
    fastest = float("inf")
    # Bases that could not win even with all the memory they might want are not measured.
    for best_case, base in sorted(_ranked(request), key=lambda pair: pair[0]):
        if best_case > fastest * (1 + WORTHWHILE):
            break
        options += _spend(request, base)
        fastest = min((seconds for seconds, _, _ in options), default=fastest)
    if not options:
        raise _refusal(request)
    # Among the practically fastest the one that needs least.
    near = (option for option in options if option[0] <= fastest * (1 + WORTHWHILE))
    _, _, chosen = min(near, key=lambda option: option[1])
    return _finish(request, chosen)


def _ranked(request: PlanRequest) -> Iterator[tuple[float, MemoryPlan]]:
    """Every base with the bound it would have if all units were resident and nothing recomputed."""
    units = frozenset(["embed", *(unit.name for unit in request.spec.layers)])
    for base in _bases(request):
        resident = units | base.resident
        ideal = replace(base, resident=resident, kept=len(request.spec.layers), offloaded=0)
        yield step_bound(request.spec, ideal, request.profile), base


def plan_graphs(spec: ModelSpec, plan: MemoryPlan) -> list[TaskGraph]:
    """The graphs of a run: train, evaluate, save, checkpoint."""
    compilers = (compile_step, compile_evaluation, compile_save, compile_checkpoint)
    return [compile_graph(spec, plan) for compile_graph in compilers]


def _bases(request: PlanRequest) -> Iterator[MemoryPlan]:
    """Micro-batch, vocabulary chunks and window; all boundaries offloaded.

    Nothing is resident but adapters, which are small; in FP32 compute, not even they.
    """
    spec, rows = request.spec, request.rows
    adapters = frozenset(unit.name for unit in spec.adapters.values())
    divisors = [d for d in range(1, rows + 1) if rows % d == 0]
    largest_layer = max(unit.numel for unit in spec.layers)
    chunk = max(CHUNK_NUMEL, -(-largest_layer // MAX_LAYER_CHUNKS))
    ratio = -(-spec.head.numel // largest_layer)
    for micro_rows in [request.micro_rows] if request.micro_rows else divisors:
        tile = request.head_tile or min(HEAD_TILE, micro_rows * request.seq_len)
        fixed = request.vocab_chunks
        for vocab_chunks in [fixed] if fixed else sorted({1, ratio, 2 * ratio}):
            vocab_rows = -(-spec.vocab // vocab_chunks)
            for window in [request.window] if request.window else _WINDOWS:
                yield MemoryPlan(
                    compute=request.compute,
                    rows=rows,
                    seq_len=request.seq_len,
                    micro_rows=micro_rows,
                    vocab_chunks=vocab_chunks,
                    head_tile=tile,
                    window=window,
                    chunk_numel=chunk,
                    offloaded=len(spec.layers),
                    # All chunks of a layer leave at once, while the next one is differentiated.
                    staging_slots=max(MIN_STAGING_SLOTS, -(-largest_layer // chunk)),
                    packed=request.packed,
                    deferred=request.deferred,
                    resident=adapters if request.compute is Compute.BF16 else frozenset(),
                    workspace=request.workspace(micro_rows, vocab_rows, tile),
                )


def _spend(request: PlanRequest, base: MemoryPlan) -> Iterator[tuple[float, int, MemoryPlan]]:
    """Ways to spend what ``base`` leaves: seconds, extra bytes, plan. Sizes are close estimates."""
    spec, budgets = request.spec, request.budgets
    layers = len(spec.layers) - spec.lowest_trained  # those with a backward to keep anything for
    streamed, base = base, _most_offloaded(request, base)
    sizes = measure(request, base)
    if (sizes.gpu > budgets.gpu or sizes.host > budgets.host) and nvme_room(budgets):
        base = _fewest_offloaded(request, streamed)
        sizes = measure(request, base)
    gpu, host = budgets.gpu - sizes.gpu, budgets.host - sizes.host
    if gpu < 0 or (host < 0 and not nvme_room(budgets)):
        return
    layer = base.micro_batches * kept_nbytes(spec, base)
    for resident, nbytes in _residents(request, base, sizes):
        if nbytes > gpu:
            break
        spared = sum(_at_rest(base, spec.unit(name)) for name in resident - base.resident)
        relieved = relieve(spec, replace(base, resident=resident), -host - spared)
        if relieved is None or nvme_nbytes(spec, relieved) > nvme_room(budgets):
            continue
        most = min(layers, (gpu - nbytes) // layer)
        for kept in sorted({most * part // 4 for part in range(5)}):
            used = nbytes + kept * layer
            plan = replace(relieved, kept=kept)
            yield step_bound(spec, plan, request.profile), used, plan
            ring = SPILL_SLOTS * layer // base.micro_batches
            if kept < most or used + ring > gpu:
                continue
            affordable = min(layers - kept, max(host, 0) // layer)
            for spilled in sorted({affordable * part // 4 for part in range(1, 5)} - {0}):
                plan = replace(relieved, kept=kept, spilled=spilled)
                seconds = step_bound(spec, plan, request.profile)
                yield seconds, used + ring + spilled * layer, plan


def _most_offloaded(request: PlanRequest, plan: MemoryPlan) -> MemoryPlan:
    """``plan`` with as many boundaries offloaded as the host has room for."""
    host = request.budgets.host
    if measure(request, plan).host <= host:
        return plan
    offloaded = _last(
        plan.offloaded, lambda n: measure(request, replace(plan, offloaded=n)).host <= host
    )
    return replace(plan, offloaded=offloaded)


def _fewest_offloaded(request: PlanRequest, plan: MemoryPlan) -> MemoryPlan:
    """``plan`` with as few boundaries offloaded as the GPU has room for, at most those it has."""
    gpu, offloaded = request.budgets.gpu, plan.offloaded
    spared = _last(
        offloaded, lambda n: measure(request, replace(plan, offloaded=offloaded - n)).gpu <= gpu
    )
    return replace(plan, offloaded=offloaded - spared)


def _residents(
    request: PlanRequest, base: MemoryPlan, sizes: Sizes
) -> Iterator[tuple[frozenset[str], int]]:
    """Sets of resident units, growing, with the GPU bytes that each adds to ``base``.

    The embedding is due first in a step and ready last, so it comes first, then layer after layer.
    """
    yield base.resident, 0
    if base.compute is not Compute.BF16:  # FP32 weights would have to be joined anew all the time
        return
    resident = base.resident | {"embed"}
    nbytes = measure(request, replace(base, resident=resident)).gpu - sizes.gpu
    yield resident, nbytes
    for unit in request.spec.layers:
        resident |= {unit.name}
        nbytes += _at_rest(base, unit)
        yield resident, nbytes


def _at_rest(plan: MemoryPlan, unit: UnitSpec) -> int:
    """Bytes that a resident unit has on the GPU, and spares the host."""
    gradient = plan.compute.nbytes if plan.deferred and not unit.frozen else 0
    return (2 + state_nbytes(unit, plan.compute) + gradient) * unit.numel


def _finish(request: PlanRequest, plan: MemoryPlan) -> MemoryPlan:
    """Make an estimated choice exact: shrink it if need be, then spend the rest on boundaries."""
    spec, budgets = request.spec, request.budgets
    order = ["embed", *(unit.name for unit in spec.layers)]
    plan = _least_on_nvme(request, plan)
    sizes = measure(request, plan)
    while sizes.gpu > budgets.gpu or sizes.host > budgets.host:
        if plan.spilled:
            plan = replace(plan, spilled=plan.spilled - 1)
        elif plan.kept:
            plan = replace(plan, kept=plan.kept - 1)
        elif movable := [name for name in order if name in plan.resident]:
            plan = replace(plan, resident=plan.resident - {movable[-1]})
        else:
            raise _refusal(request)  # the estimate was out by what fills pages on NVMe
        sizes = measure(request, plan)
    plan = _least_on_nvme(request, _fewest_offloaded(request, plan))
    sizes = measure(request, plan)
    plan = _assign_gradients(request, replace(plan, boundary_slots=sizes.boundaries), sizes)
    seconds = request.predict(compile_step(spec, plan)).seconds
    return replace(plan, peaks=peaks(request, plan), step_seconds=seconds)


def _least_on_nvme(request: PlanRequest, plan: MemoryPlan) -> MemoryPlan:
    """``plan`` with as little on NVMe as brings the host within its budget, or as much as may be.

    Unlike `relieve`, to the byte.
    """

    def fits(candidate: MemoryPlan) -> bool:
        return measure(request, candidate).host <= request.budgets.host

    while not fits(plan):
        more = more_on_nvme(request.spec, plan)
        if more is None or nvme_nbytes(request.spec, more) > nvme_room(request.budgets):
            return plan
        plan = more
    while (less := less_on_nvme(request.spec, plan)) is not None and fits(less):
        plan = less
    return plan


def _last(limit: int, holds: Callable[[int], bool]) -> int:
    """The largest number up to ``limit`` for which ``holds``, given that it holds for all below."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        if holds(middle):
            low = middle
        else:
            high = middle - 1
    return low


def _assign_gradients(request: PlanRequest, plan: MemoryPlan, sizes: Sizes) -> MemoryPlan:
    """Park as many gradients at once as the host budget allows; deferred, all of them.

    Each chunk takes, in program order, the slot that a simulated step frees first.
    """
    if sizes.gradients == 0:
        return plan
    if plan.deferred:
        every = tuple(range(sizes.gradients))
        return replace(plan, gradient_slots=len(every), gradient_slot=every)
    room = request.budgets.host - sizes.host
    count = min(sizes.gradients, MIN_GRADIENT_SLOTS + room // sizes.gradient)
    graph = compile_step(request.spec, plan)
    stops = request.predict(graph).stops
    free = [0.0] * count
    slots: list[int] = []
    for name in graph.buffers:  # in program order
        if is_gradient(name):
            slot = min(range(count), key=lambda s: free[s])
            slots.append(slot)
            free[slot] = stops[name.replace("gh.", "update.", 1)]
    return replace(plan, gradient_slots=count, gradient_slot=tuple(slots))


def _refusal(request: PlanRequest) -> BudgetError:
    """The error that names the least GPU and the least host budget, the other one as it is."""
    budgets = request.budgets
    gpu: list[int] = []
    host: list[int] = []
    both: list[tuple[int, int]] = []
    for base in _bases(request):
        base = most_on_nvme(request.spec, base, nvme_room(budgets))
        sizes = measure(request, base)
        both.append((sizes.gpu, sizes.host))
        sizes = measure(request, _most_offloaded(request, base))
        if sizes.host <= budgets.host:
            gpu.append(sizes.gpu)
        sizes = measure(request, _fewest_offloaded(request, base))
        if sizes.gpu <= budgets.gpu:
            host.append(sizes.host)
    ways = [
        f"--{name}-memory {_mib(min(found))}MiB"
        for name, found in (("gpu", gpu), ("cpu", host))
        if found
    ]
    if not ways:
        least = min(both)
        ways = [f"--gpu-memory {_mib(least[0])}MiB with --cpu-memory {_mib(least[1])}MiB"]
    limited = budgets.nvme_writes is not None and budgets.nvme_writes < budgets.nvme
    limit = ", and so does the host with a higher --nvme-write-limit" if limited else ""
    with_nvme = f" and {nvme_room(budgets) >> 20} MiB of NVMe" if nvme_room(budgets) else ""
    return BudgetError(
        f"no plan fits {budgets.gpu >> 20} MiB of GPU memory and {budgets.host >> 20} MiB of host "
        f"memory{with_nvme} for {request.rows} rows of {request.seq_len} tokens; the least that "
        f"works is {' or '.join(ways)}. A smaller --batch-size, --accumulate or --seq-len needs "
        f"less{limit}"
    )


def _mib(nbytes: int) -> int:
    return -(-nbytes // (1 << 20))
