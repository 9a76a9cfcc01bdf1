"""Make a memory plan: the solver's choice with gradient slots, simulated; or say what would fit.

Everything is computed before anything is allocated.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

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
    park_gradients,
)
from slideformer.memory.lattice import WINDOWS
from slideformer.memory.needs import MIN_GRADIENT_SLOTS, peaks
from slideformer.memory.nvme_needs import nvme_room
from slideformer.memory.request import PlanRequest
from slideformer.memory.solver import Lattice, Solution

STEPS = 3
"""Simulated steps: the first fills the pipeline, and the time between the others' ends counts."""

_MIB = 1 << 20


def make_plan(request: PlanRequest) -> MemoryPlan:
    """The plan for ``request``; raises `BudgetError` with the least budgets that would work."""
    lattice = Lattice(request)
    with _collector_off():
        found = lattice.solve(request.budgets)
        if found is None:
            raise _refusal(request, lattice)
        graph = compile_step(request.spec, found.plan)
        plan = _assign_gradients(request, found, graph)
        step = request.predict(park_gradients(graph, plan.gradient_slot), STEPS)
        plan = replace(plan, peaks=peaks(request, plan), step_seconds=step.seconds)
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


def _assign_gradients(request: PlanRequest, found: Solution, graph: TaskGraph) -> MemoryPlan:
    """Park as many gradients at once as the host budget allows; deferred, all of them.

    Each chunk takes, in program order, the slot that a simulated step frees first.
    """
    plan = found.plan
    if found.gradients == 0:
        return plan
    count = min(found.gradients, MIN_GRADIENT_SLOTS + found.spare_host // found.gradient)
    if plan.deferred:
        count = found.gradients
    if count == found.gradients:  # each in a place of its own
        return replace(plan, gradient_slots=count, gradient_slot=tuple(range(count)))
    stops = request.predict(graph, 1).stops
    free = [0.0] * count
    slots: list[int] = []
    for name in graph.buffers:  # in program order
        if name.startswith("gh."):
            slot = min(range(count), key=lambda s: free[s])
            slots.append(slot)
            free[slot] = stops[name.replace("gh.", "update.", 1)]
    return replace(plan, gradient_slots=count, gradient_slot=tuple(slots))


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
    """What else would need less memory."""
    smaller = ["--batch-size", "--accumulate", "--seq-len"]
    if request.micro_rows is not None and request.micro_rows > 1:
        smaller.append("--micro-batch")
    if request.window is not None and request.window > min(WINDOWS):
        smaller.append("--window")
    yield f"A smaller {', '.join(smaller[:-1])} or {smaller[-1]} needs less."
    if request.deferred:
        yield "Without --max-grad-norm and --skip-nonfinite, gradients need not all wait at once."
    if not request.budgets.nvme:
        yield "With --nvme FOLDER, optimizer state waits there and not on the host."


def _mib(nbytes: int) -> int:
    return -(-nbytes // _MIB)
