"""Make a memory plan: the solver's choice with gradient slots, simulated; or say what would fit.

Everything is computed before anything is allocated.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from slideformer.graph.buffers import Tier, host_bytes
from slideformer.graph.errors import BudgetError
from slideformer.graph.graph import TaskGraph
from slideformer.graph.model import ModelSpec
from slideformer.graph.plan import UNLIMITED, Budgets, MemoryPlan
from slideformer.graph.step import (
    compile_checkpoint,
    compile_evaluation,
    compile_save,
    compile_step,
    draft_step,
    park_gradients,
)
from slideformer.memory.lattice import WINDOWS
from slideformer.memory.needs import MIN_GRADIENT_SLOTS, peaks
from slideformer.memory.nvme_needs import nvme_room
from slideformer.memory.request import PlanRequest
from slideformer.memory.solver import Lattice, Solution

STEPS = 3
"""Simulated steps: the first fills the pipeline, and the time between the others' ends counts."""

CONTENDERS = 24
"""At most so many plans are simulated before one is chosen."""

SIMULATED_TASKS = 10_000
"""And no more than have as many tasks, so that planning takes no longer for a small model."""

CAUTION = 0.9
"""Share of the CPU's rate that they are compared at. Memory of a host is not equally fast from run
to run, and a plan that wins by a hair at one rate may lose much at the next."""

_MIB = 1 << 20


def make_plan(request: PlanRequest, lattice: Lattice | None = None) -> MemoryPlan:
    """The plan for ``request``; raises `BudgetError` with the least budgets that would work.

    ``lattice``, if given, is that of ``request``.
    """
    lattice = lattice or Lattice(request)
    with _collector_off():
        found = lattice.solve(request.budgets)
        if found is None:
            raise _refusal(request, lattice)
        draft = _choose(request, lattice, found)
        step = request.predict(draft.graph, request.profile, STEPS)
        sizes = peaks(request, draft.plan, draft.graph)
        plan = replace(draft.plan, peaks=sizes, step_seconds=step.seconds)
        return _with_snapshot(request, plan) if request.checkpoints else plan


@contextmanager
def _collector_off() -> Iterator[None]:
    """Graphs have no cycles to collect, and looking for some takes as long as compiling them."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def plan_graphs(spec: ModelSpec, plan: MemoryPlan) -> list[TaskGraph]:
    """The graphs of a run: train, evaluate, save, checkpoint."""
    compilers = (compile_step, compile_evaluation, compile_save, compile_checkpoint)
    return [compile_graph(spec, plan) for compile_graph in compilers]


def _with_snapshot(request: PlanRequest, plan: MemoryPlan) -> MemoryPlan:
    """``plan`` with room for a snapshot, if the host budget has that left."""
    larger = replace(plan, snapshot=True)
    larger = replace(larger, peaks=peaks(request, larger))
    used = host_bytes(larger.peaks)
    if request.budgets.gpu is None:  # one budget for both tiers
        used += larger.peaks[Tier.GPU]
    return larger if used <= request.budgets.host else plan


@dataclass(frozen=True)
class _Draft:
    """A plan with its gradient slots, and its graph."""

    plan: MemoryPlan
    graph: TaskGraph


def _choose(request: PlanRequest, lattice: Lattice, found: Solution) -> _Draft:
    """The plan that is fastest in simulation of those that the bound cannot tell from ``found``.

    Without a GPU, copies between tiers cost what they spare, and the bound decides.
    """
    draft = _draft(request, found)
    count = min(CONTENDERS, SIMULATED_TASKS // len(draft.graph.tasks))
    if request.budgets.gpu is None or count < 2:
        return draft
    contenders = lattice.contenders(request.budgets, found, count)
    machine = replace(request.profile, update=CAUTION * request.profile.update)

    def rank(draft: _Draft) -> float:
        return request.predict(draft.graph, machine, STEPS).seconds

    return min([draft, *(_draft(request, other) for other in contenders[1:])], key=rank)


def _draft(request: PlanRequest, found: Solution) -> _Draft:
    """Park as many gradients at once as the host budget allows; deferred, all of them.

    Each chunk takes, in program order, the slot that a simulated step frees first.
    """
    plan, graph = found.plan, draft_step(request.spec, found.plan)
    if found.gradients == 0:
        return _Draft(plan, graph)
    count = min(found.gradients, MIN_GRADIENT_SLOTS + found.spare_host // found.gradient)
    if plan.deferred:
        count = found.gradients
    slots = list(range(count))
    if count < found.gradients:  # else each has a place of its own
        stops = request.predict(graph, request.profile, 1).stops
        free = [0.0] * count
        slots = []
        for name in graph.buffers:  # in program order
            if name.startswith("gh."):
                slot = min(range(count), key=lambda s: free[s])
                slots.append(slot)
                free[slot] = stops[name.replace("gh.", "update.", 1)]
    plan = replace(plan, gradient_slots=count, gradient_slot=tuple(slots))
    return _Draft(plan, park_gradients(graph, plan.gradient_slot))


def _refusal(request: PlanRequest, lattice: Lattice) -> BudgetError:
    """The error that names the least of each budget that works with the others as they are."""
    budgets, room = request.budgets, nvme_room(request.budgets)
    ways = [*_ways(lattice, budgets)]
    if not ways and budgets.gpu is not None:
        least = lattice.least_gpu(replace(budgets, host=UNLIMITED))
        assert least is not None, "a host without end holds every plan"
        gpu = _mib(least)
        host = lattice.least_host(replace(budgets, gpu=gpu * _MIB))
        assert host is not None, "this GPU holds a plan"
        ways.append(f"--gpu-memory {gpu}MiB with --cpu-memory {_mib(host)}MiB")
    places = [] if budgets.gpu is None else [f"{budgets.gpu >> 20} MiB of GPU memory"]
    if budgets.host < UNLIMITED:
        places.append(f"{budgets.host >> 20} MiB of host memory")
    if room:
        places.append(f"{room >> 20} MiB of NVMe")
    return BudgetError(
        f"no plan fits {' and '.join(places)} for {request.rows} rows of {request.seq_len} tokens; "
        f"the least that works is {' or '.join(ways)}. {' '.join(_knobs(request))}"
    )


def _ways(lattice: Lattice, budgets: Budgets) -> Iterator[str]:
    """Budgets that would do, one flag each but where NVMe has two."""
    if budgets.gpu is not None and (gpu := lattice.least_gpu(budgets)) is not None:
        yield f"--gpu-memory {_mib(gpu)}MiB"
    if (host := lattice.least_host(budgets)) is not None:
        yield f"--cpu-memory {_mib(host)}MiB"
    nvme = lattice.least_nvme(budgets) if budgets.nvme else None
    if nvme is not None:
        flags = [f"--nvme-memory {_mib(nvme)}MiB"] if nvme > budgets.nvme else []
        if budgets.nvme_writes is not None and nvme > budgets.nvme_writes:
            flags.append(f"--nvme-write-limit {_mib(nvme)}MiB")
        yield " with ".join(flags)


def _knobs(request: PlanRequest) -> Iterator[str]:
    """What else would need less memory, and may be changed."""
    smaller = [] if request.resumed else ["--batch-size", "--accumulate", "--seq-len"]
    if request.micro_rows is not None and request.micro_rows > 1 and not request.resumed:
        smaller.append("--micro-batch")
    if request.window is not None and request.window > min(WINDOWS):
        smaller.append("--window")
    if request.resumed:
        yield "A resumed run keeps its batch."
    if smaller:
        *others, last = smaller
        yield f"A smaller {', '.join(others)}{' or ' if others else ''}{last} needs less."
    if request.deferred and not request.resumed:
        yield "Without --max-grad-norm and --skip-nonfinite, gradients need not all wait at once."
    if not request.budgets.nvme:
        yield "With --nvme FOLDER, optimizer state waits there and not on the host."


def _mib(nbytes: int) -> int:
    return -(-nbytes // _MIB)
