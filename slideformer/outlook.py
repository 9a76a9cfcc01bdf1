"""What a plan could not show by itself: what holds it back, and what other budgets would give."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from slideformer.graph.plan import Budgets, MemoryPlan
from slideformer.graph.tasks import Lane
from slideformer.memory.request import PlanRequest
from slideformer.memory.solver import Lattice as Lattice
from slideformer.memory.solver import Solution as Solution

MORE = 1 << 30
"""Bytes by which each budget is raised to see what that would give."""


@dataclass(frozen=True)
class Outlook:
    """``bound``: seconds of a step that no order goes below, by which plans are compared.

    ``work`` are the seconds of each lane, the busiest of which binds the step. ``gains`` are, for
    each budget that there is, the shares that one GiB more would save of the least bound of all
    plans, to which that of the plan chosen is near.
    """

    bound: float
    work: Mapping[Lane, float]
    gains: Mapping[str, float]

    @property
    def binding(self) -> Lane:
        """The busiest lane."""
        return max(self.work, key=lambda lane: self.work[lane])


def outlook(lattice: Lattice, plan: MemoryPlan, budgets: Budgets) -> Outlook:
    """The outlook for a plan of the lattice that was chosen under ``budgets``."""
    fastest = lattice.fastest(budgets)
    gains = {name: 1 - lattice.fastest(more) / fastest for name, more in _raised(budgets)}
    return Outlook(*lattice.work(plan), gains)


def _raised(budgets: Budgets) -> Iterator[tuple[str, Budgets]]:
    if budgets.gpu is not None:
        yield "GPU memory", replace(budgets, gpu=budgets.gpu + MORE)
    yield "host memory", replace(budgets, host=budgets.host + MORE)
    if budgets.nvme:
        writes = None if budgets.nvme_writes is None else budgets.nvme_writes + MORE
        yield "NVMe", replace(budgets, nvme=budgets.nvme + MORE, nvme_writes=writes)


def solve_each(request: PlanRequest, budgets: Sequence[Budgets]) -> list[Solution | None]:
    """The plan of the best bound under each of several budgets; None where nothing fits.

    Of the plans near to it `make_plan` may choose another, which is faster when simulated.
    """
    lattice = Lattice(request)
    return [lattice.solve(each) for each in budgets]
