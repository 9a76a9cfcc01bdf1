"""Graphs of plans with something on NVMe: every byte is read and written as often as it must be."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from slideformer.graph.buffers import PAGE, Tier
from slideformer.graph.graph import TaskGraph
from slideformer.graph.model import ModelSpec
from slideformer.graph.plan import Compute, MemoryPlan, Optimizer
from slideformer.graph.step import compile_evaluation, compile_save, compile_step, footprint
from slideformer.graph.step_nvme import (
    HI,
    LO,
    MOMENTS,
    boundaries_on_nvme,
    units_on_nvme,
)
from slideformer.graph.tasks import TaskKind
from slideformer.graph.verify import verify
from slideformer.memory.layout import places
from tests.support.specs import draft_plans, specs

Case = tuple[ModelSpec, MemoryPlan]

some = settings(max_examples=30)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A spec and a plan for it with any share of everything on NVMe."""
    spec = draw(specs())
    plan = draw(draft_plans(spec))
    layers = st.integers(0, len(spec.layers))
    bf16 = plan.compute is Compute.BF16
    return spec, replace(
        plan,
        nvme_moments=draw(layers),
        nvme_lo=draw(layers) if bf16 else 0,
        nvme_hi=draw(layers) if bf16 else 0,
        nvme_boundaries=draw(layers),
        nvme_slots=draw(st.integers(1, 4)),
        nvme_direct=draw(st.booleans()),
    )


def moved(graph: TaskGraph, kind: TaskKind) -> Counter[str]:
    """How often each extent is read from NVMe, or written there."""
    return Counter(
        name
        for task in graph.tasks
        if task.kind is kind
        for name in (task.reads if kind is TaskKind.NVME_READ else task.writes)
    )


@some
@given(cases())
def test_graphs_keep_the_rules_and_extents_are_whole_pages(case: Case) -> None:
    graphs = [compile_(*case) for compile_ in (compile_step, compile_evaluation, compile_save)]
    for graph in graphs:
        verify(graph)
        for buffer in graph.buffers.values():
            if buffer.tier is Tier.NVME:
                assert buffer.nbytes % PAGE == 0
                assert not buffer.slot
        for ring in ("staged.", "wh.", "xs."):
            assert sum(name.startswith(ring) for name in graph.slots) <= case[1].nvme_slots
    spec, plan = case
    assert footprint(*case) == places(graphs)
    boundary = plan.micro_tokens * spec.hidden * plan.compute.nbytes
    if plan.nvme_direct and boundary % PAGE == 0:
        assert not any(name.startswith("xs.") for name in graphs[0].slots)


@some
@given(cases())
def test_a_step_writes_each_extent_once_and_reads_it_as_often_as_it_must(case: Case) -> None:
    spec, plan = case
    graph = compile_step(spec, plan)
    reads, writes = moved(graph, TaskKind.NVME_READ), moved(graph, TaskKind.NVME_WRITE)
    assert set(writes.values()) <= {1}
    assert reads.keys() == writes.keys()
    # Weights that forward leaves on the GPU are not read again for backward.
    again = {task.name.split(".")[1] for task in graph.tasks if ".bwd.c" in task.name}
    for extent, count in reads.items():
        kind, unit, *_ = extent.split(".")
        # Deferred, the window no longer has the weights when they are updated.
        assert count == (1 if kind != HI else 1 + (unit in again) + plan.deferred)
    kinds = units_on_nvme(spec, plan)
    assert {tuple(name.split(".")[:2]) for name in writes if not name.startswith("away.")} == {
        (kind, unit) for unit in kinds for kind in kinds[unit]
    }
    away = {name for name in writes if name.startswith("away.")}
    assert away == {
        f"away.x.{unit}.m{m}"
        for unit in boundaries_on_nvme(spec, plan)
        for m in range(plan.micro_batches)
    }


@some
@given(cases())
def test_what_is_on_nvme_is_nowhere_else(case: Case) -> None:
    spec, plan = case
    wanted = footprint(spec, plan)
    kinds = units_on_nvme(spec, plan)
    for unit in spec.layers:
        stored = kinds.get(unit.name, ())
        assert (f"hi.{unit.name}" in wanted) == (HI not in stored)
        if unit.frozen:
            assert not stored
            continue
        n = unit.numel
        moments = {
            Optimizer.ADAMW: 8 * n,
            Optimizer.LION: 4 * n,
            Optimizer.ADAMW8BIT: 2 * n + 8 * -(-n // 128),
        }
        size = 2 * n * (LO not in stored) + moments[plan.optimizer] * (MOMENTS not in stored)
        _, found = wanted.get(f"state.{unit.name}", (Tier.CPU, 0))
        assert found == size
    for unit in boundaries_on_nvme(spec, plan):
        assert unit != spec.layers[0].name
        assert f"xh.{unit}" not in wanted


@some
@given(cases())
def test_an_evaluation_reads_weights_only_and_a_save_both_halves(case: Case) -> None:
    kinds = units_on_nvme(*case)
    evaluation, save = compile_evaluation(*case), compile_save(*case)
    for graph, saved in ((evaluation, (HI,)), (save, (LO, HI))):
        assert not moved(graph, TaskKind.NVME_WRITE)
        reads = moved(graph, TaskKind.NVME_READ)
        assert set(reads.values()) <= {1}
        assert {tuple(name.split(".")[:2]) for name in reads} == {
            (kind, unit) for unit in kinds for kind in kinds[unit] if kind in saved
        }
