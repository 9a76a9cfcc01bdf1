"""Graphs of models with adapters: they keep all rules, and update and save adapters alone."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from slideformer.graph.adapters import PROJECTIONS, adapted_parts, with_adapters
from slideformer.graph.buffers import Role
from slideformer.graph.model import Lora, ModelSpec
from slideformer.graph.plan import Compute
from slideformer.graph.step import (
    compile_checkpoint,
    compile_evaluation,
    compile_save,
    compile_step,
    footprint,
)
from slideformer.graph.tasks import TaskKind
from slideformer.graph.verify import verify
from slideformer.memory.layout import places
from tests.support.specs import draft_plans, specs

some = settings(max_examples=40)


@some
@given(specs(), st.integers(1, 5), st.data())
def test_adapters_are_updated_and_saved_and_nothing_else(
    plain: ModelSpec, rank: int, data: st.DataObject
) -> None:
    spec = with_adapters(plain, Lora(rank, 2.0 * rank))
    plan = data.draw(draft_plans(spec))
    step, evaluation, save, checkpoint = graphs = [
        compiled(spec, plan)
        for compiled in (compile_step, compile_evaluation, compile_save, compile_checkpoint)
    ]
    for graph in graphs:
        verify(graph)
    assert footprint(spec, plan) == places(graphs)
    adapters = {unit.name for unit in spec.adapters.values()}
    assert len(adapters) == len(spec.layers)

    written = {n for task in step.tasks for n in task.writes if n.startswith(("hi.", "state."))}
    assert {name.split(".")[1] for name in written} == adapters
    gradients = [b for b in step.buffers.values() if b.role is Role.GRADIENT]
    assert {b.name.split(".")[1] for b in gradients} <= adapters | {"dx"}
    for graph in (save, checkpoint):
        saved = [t.args["unit"] for t in graph.tasks if t.kind is TaskKind.SAVE]
        assert set(saved) == adapters
    for graph in (step, evaluation):
        for task in graph.tasks:
            if task.op in ("fwd", "bwd"):
                unit = spec.adapters[str(task.args["unit"])]
                kind = "hi" if unit.name in plan.resident else "w"
                read = [n for n in task.reads if n.startswith(f"{kind}.{unit.name}.")]
                numel = sum(graph.buffers[name].nbytes for name in read) / plan.compute.nbytes
                assert numel == unit.numel
    frozen = 0 if plan.compute is Compute.BF16 else 2
    for unit in spec.own_units:
        state = [b.nbytes for b in step.buffers.values() if b.place == f"state.{unit.name}"]
        assert sum(state) in (0, frozen * unit.numel)


@given(specs(), st.integers(1, 5), st.sets(st.sampled_from(["qkv", "o", "gate_up", "down"])))
def test_the_parts_of_a_projection_tile_its_rows(
    plain: ModelSpec, rank: int, names: set[str]
) -> None:
    spec = with_adapters(plain, Lora(rank, 1.0))
    for layer in spec.layers:
        for name in names:
            rows = next(o.shape[0] for o in layer.operands if o.name == f"{name}.weight")
            parts = adapted_parts(layer, Lora(rank, 1.0), name)
            assert [first for first, _ in parts] == [0, *(last for _, last in parts[:-1])]
            assert parts[-1][1] == rows
            adapter = spec.adapters[layer.name]
            shapes = {o.name: o.shape for o in adapter.operands}
            assert shapes[f"{name}.lora_B"] == (rows, rank)
            assert shapes[f"{name}.lora_A"][0] == rank * len(parts)


@some
@given(specs(), st.data())
def test_the_wide_sides_of_adapted_projections_pass_through_memory(
    plain: ModelSpec, data: st.DataObject
) -> None:
    spec = with_adapters(plain, Lora(2, 4.0))
    plan = data.draw(draft_plans(spec))
    for task in compile_step(spec, plan).tasks:
        if task.op not in ("fwd", "bwd"):
            continue
        layer = next(unit for unit in spec.layers if unit.name == task.args["unit"])
        sides = {
            o.name: o.shape
            for o in layer.operands
            if o.share == 1 and o.name.removesuffix(".weight") in PROJECTIONS
        }
        forward = {name: columns + 2 * rows for name, (rows, columns) in sides.items()}
        passed = sum(forward.values())
        if task.op == "bwd":
            kept = any(name.startswith("kept.") for name in task.reads)
            passed = sum(4 * columns + 3 * rows for rows, columns in sides.values())
            passed += 0 if kept else sum(forward.values()) - forward.get("down.weight", 0)
        assert task.cost.nbytes == passed * plan.micro_tokens * plan.compute.nbytes
