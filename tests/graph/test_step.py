"""The compiled graphs: whatever the plan, they keep all rules and do a step's work exactly once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slideformer.graph.analysis import next_instance_edges
from slideformer.graph.buffers import Buffer, Role, Tier
from slideformer.graph.chunks import vocab_chunks
from slideformer.graph.errors import BudgetError
from slideformer.graph.graph import TaskGraph
from slideformer.graph.model import ModelSpec
from slideformer.graph.plan import Compute, MemoryPlan, Optimizer
from slideformer.graph.step import (
    compile_checkpoint,
    compile_evaluation,
    compile_save,
    compile_step,
    draft_step,
    footprint,
)
from slideformer.graph.tasks import Task, TaskKind
from slideformer.graph.verify import verify
from slideformer.memory.layout import places
from tests.support.specs import draft_plans, small_plan, small_spec, specs

Case = tuple[ModelSpec, MemoryPlan]

some = settings(max_examples=40)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A spec and a plan for it, with bounded pools or without."""
    spec = draw(specs())
    plan = draw(draft_plans(spec))
    if draw(st.booleans()):
        plan = replace(plan, boundary_slots=pool_size(spec, plan) + draw(st.integers(0, 2)))
    if not plan.deferred and draw(st.booleans()):
        slots = draw(st.integers(1, 4))
        graph = compile_step(spec, plan)
        parked = sum(name.startswith("gh.") for name in graph.buffers)
        seed = draw(st.integers(0, 10**6))
        assigned = tuple((seed >> (i % 20)) % slots for i in range(parked))
        plan = replace(plan, gradient_slots=slots, gradient_slot=assigned)
    return spec, replace(plan, snapshot=draw(st.booleans()))


def pool_size(spec: ModelSpec, plan: MemoryPlan) -> int:
    """Boundary slots that the graphs of a plan need at once."""
    return sum(
        name.startswith("x.") for name in footprint(spec, replace(plan, boundary_slots=None))
    )


def graphs_of(spec: ModelSpec, plan: MemoryPlan) -> list[TaskGraph]:
    """Step, evaluation, save and checkpoint."""
    compilers = (compile_step, compile_evaluation, compile_save, compile_checkpoint)
    return [compile_(spec, plan) for compile_ in compilers]


def owned(graph: TaskGraph, names: Iterable[str]) -> list[Buffer]:
    """Those buffers that hold masters and optimizer state."""
    return [graph.buffers[n] for n in names if n.startswith(("hi.", "state."))]


def tiled(buffers: Iterable[Buffer]) -> dict[str, int]:
    """Bytes of each place, which the buffers must cover from its start without gap or overlap."""
    reached: dict[str, int] = {}
    for buffer in sorted(buffers, key=lambda b: (b.place, b.offset)):
        assert buffer.offset == reached.get(buffer.place, 0), buffer
        reached[buffer.place] = buffer.stop
    return reached


def whole_state(spec: ModelSpec, plan: MemoryPlan) -> dict[str, int]:
    """Bytes of all masters and optimizer state, less what frozen units do without."""
    return {
        f"{kind}.{unit.name}": size
        for unit in spec.units
        for kind, size in (("hi", 2 * unit.numel), ("state", state_of(spec, plan, unit.name)))
        if size
    }


def in_8_bits(spec: ModelSpec, plan: MemoryPlan, name: str) -> bool:
    """Whether a unit's moments are codes, all but those of the vocabulary's narrow matrices."""
    wide = spec.hidden % 128 == 0 and not spec.tied
    matrices = ("embed",) if wide else ("embed", "head")
    return plan.optimizer is Optimizer.ADAMW8BIT and name not in matrices


def state_of(spec: ModelSpec, plan: MemoryPlan, name: str, numel: int | None = None) -> int:
    """Bytes of a unit's state beside upper halves, of its first ``numel`` elements if given."""
    unit = spec.unit(name)
    count = unit.numel if numel is None else numel
    if unit.frozen:
        return 2 * count if plan.compute is Compute.FP32 else 0
    if in_8_bits(spec, plan, name):
        return 4 * count + 8 * -(-count // 128)
    return (6 if plan.optimizer is Optimizer.LION else 10) * count


def trained_state(spec: ModelSpec, plan: MemoryPlan) -> dict[str, int]:
    """The same of trained units alone."""
    trained = {unit.name for unit in spec.units if not unit.frozen}
    whole = whole_state(spec, plan)
    return {place: n for place, n in whole.items() if place.partition(".")[2] in trained}


def is_update(task: Task) -> bool:
    """Whether a task changes weights."""
    return task.op.startswith("update")


@some
@given(cases())
def test_every_plan_gives_graphs_that_keep_the_rules(case: Case) -> None:
    for graph in graphs_of(*case):
        verify(graph)


@some
@given(cases())
def test_every_element_is_updated_exactly_once(case: Case) -> None:
    spec, plan = case
    graph = compile_step(spec, plan)
    used = [task for task in graph.tasks if task.op.startswith("update_used_rows")]
    # Idle rows and used rows are complements: the former tile the embedding like any unit's update,
    # one task has all of the latter.
    others = [task for task in graph.tasks if is_update(task) and task not in used]
    assert tiled(b for t in others for b in owned(graph, t.writes)) == trained_state(spec, plan)
    embed = {place: n for place, n in trained_state(spec, plan).items() if place.endswith(".embed")}
    assert tiled(b for t in used for b in owned(graph, t.writes)) == embed
    assert len(used) == (not spec.embed.frozen)
    for task in graph.tasks:
        assert is_update(task) or not owned(graph, task.writes)


@some
@given(cases())
def test_an_update_is_told_the_elements_that_it_owns(case: Case) -> None:
    spec, plan = case
    graph = compile_step(spec, plan)
    for task in graph.tasks:
        if not is_update(task):
            continue
        unit = str(task.args.get("unit", "embed"))
        begin = int(task.args.get("begin", 0))
        end = int(task.args.get("end") or spec.unit(unit).numel)  # used rows may be anywhere
        his = [b for b in owned(graph, task.writes) if b.place == f"hi.{unit}"]
        states = [b for b in owned(graph, task.writes) if b.place == f"state.{unit}"]
        assert (his[0].offset, his[-1].stop) == (2 * begin, 2 * end)
        assert (states[0].offset, states[-1].stop) == (
            state_of(spec, plan, unit, begin),
            state_of(spec, plan, unit, end),
        )
        squares = [graph.buffers[name] for name in task.writes if name.startswith("square.")]
        assert len(squares) == (not plan.deferred)
        assert len(task.writes) == len(his) + len(states) + len(squares)
        assert (task.kind is TaskKind.COMPUTE) == (unit in plan.resident)


@some
@given(cases())
def test_the_norm_adds_up_every_gradient_once(case: Case) -> None:
    spec, plan = case
    graph = compile_step(*case)
    names = [name for task in graph.tasks for name in task.writes if name.startswith("square.")]
    assert len(set(names)) == len(names)
    down = [task for task in graph.tasks if task.name == "d2h.squares"]
    (report,) = (
        task
        for task in graph.tasks
        if task.op in ("report", "clip") and task.reads[0] != "loss_host"
    )
    direct = [name for name in report.reads if not name.startswith(("gh.", "squares_host"))]
    assert Counter(names) == Counter([*direct, *(n for task in down for n in task.reads)])
    assert all(graph.buffers[name].nbytes == 8 for name in names)
    tiled(graph.buffers[name] for name in names)
    travelled = {name for name in report.reads if name.startswith("gh.")}
    if plan.deferred:
        assert travelled == {name for name in graph.buffers if name.startswith("gh.")}
        units = {name.split(".")[1] for name in (*names, *travelled)}
        assert units == {unit.name for unit in spec.units if not unit.frozen}
    else:
        assert not travelled
        assert len(names) == sum(is_update(task) for task in graph.tasks)


@some
@given(cases())
def test_deferred_updates_follow_the_norm_and_forward_order(case: Case) -> None:
    spec, plan = case
    graph = compile_step(spec, replace(plan, deferred=True, gradient_slots=0, gradient_slot=()))
    clip = graph.index["clip.norm"]
    updates = [task for task in graph.tasks if is_update(task)]
    for task in updates:
        position = graph.index[task.name]
        assert position > clip
        assert clip in graph.edges.predecessors[position]
    order = [str(task.args.get("unit", "embed")) for task in updates]
    forward = [unit.name for unit in spec.units]
    assert order == sorted(order, key=forward.index)
    parked = [b for b in graph.buffers.values() if b.name.startswith(("gh.", "parked."))]
    written = Counter(n for task in graph.tasks for n in task.writes if n.startswith("gh."))
    assert set(written.values()) <= {1}
    assert len({(b.place, b.offset) for b in parked}) == len(parked), "each has its own place"


def test_the_next_forward_waits_for_each_layer_alone() -> None:
    """A deferred update is due when the next step brings its own layer up, and not before."""
    graph = compile_step(small_spec(), small_plan(deferred=True, chunk_numel=10_000))
    edges = next_instance_edges(graph)
    for unit in ("L00", "L01", "L02"):
        up = graph.index[f"h2d.{unit}.fwd.c0"]
        waits = {graph.tasks[before].name for before, after in edges if after == up}
        assert {name for name in waits if name.startswith("update.")} == {f"update.{unit}.c0"}


@some
@given(cases())
def test_micro_batches_are_layer_major(case: Case) -> None:
    spec, plan = case
    layers = [unit.name for unit in spec.layers]
    trained = [i for i, unit in enumerate(spec.units) if not unit.frozen]
    lowest = max(trained[0] - 1, 0)  # the embedding comes before the layers
    micro = range(plan.micro_batches)
    for graph in graphs_of(spec, plan)[:2]:
        forward = [t.name for t in graph.tasks if t.op == "fwd"]
        assert forward == [f"fwd.{unit}.m{m}" for unit in layers for m in micro]
    backward = [t.name for t in compile_step(spec, plan).tasks if t.op == "bwd"]
    assert backward == [f"bwd.{unit}.m{m}" for unit in reversed(layers[lowest:]) for m in micro]


@some
@given(cases())
def test_weights_come_up_at_most_once_a_pass_and_resident_ones_never(case: Case) -> None:
    spec, plan = case
    computed = [*spec.layers, spec.norm, spec.head]
    for graph in graphs_of(spec, plan)[:2]:
        loads = Counter(
            name
            for task in graph.tasks
            if task.kind is TaskKind.H2D
            for name in task.reads
            if name.startswith("hi.")
        )
        for name, count in loads.items():
            once = graph.name == "evaluate" or name.startswith("hi.norm.")
            assert count <= (1 if once else 2)
        needed = {f"hi.{u.name}": 2 * u.numel for u in computed if u.name not in plan.resident}
        assert tiled(graph.buffers[name] for name in loads) == needed


@some
@given(cases())
def test_what_forward_leaves_in_the_window_need_not_come_up_again(case: Case) -> None:
    spec, plan = case
    plan = replace(plan, vocab_chunks=1)
    graph = compile_step(spec, plan)
    streamed = [unit.name for unit in spec.layers if unit.name not in plan.resident]
    again = {task.name.split(".")[1] for task in graph.tasks if ".bwd.c" in task.name}
    backward = {unit.name for unit in spec.layers[spec.lowest_trained :]}
    assert again == set(streamed[: -plan.window]) & backward


@some
@given(cases())
def test_a_layer_computes_with_its_own_weights_only(case: Case) -> None:
    spec, plan = case
    for graph in graphs_of(spec, plan)[:2]:
        for task in graph.tasks:
            if task.op not in ("fwd", "bwd"):
                continue
            unit = spec.unit(str(task.args["unit"]))
            weights = [graph.buffers[n] for n in task.reads if graph.buffers[n].role is Role.WEIGHT]
            kind = "hi" if unit.name in plan.resident else "w"
            assert all(b.name.startswith(f"{kind}.{unit.name}.") for b in weights)
            assert list(tiled(weights).values()) == [plan.compute.nbytes * unit.numel]


@some
@given(cases())
def test_offloaded_boundaries_go_down_once_and_come_up_once(case: Case) -> None:
    spec, plan = case
    graph = compile_step(spec, plan)
    units = [unit.name for unit in spec.layers[spec.lowest_trained : plan.offloaded]]
    micro = range(plan.micro_batches)
    down = [t.name for t in graph.tasks if t.name.startswith("d2h.x.")]
    up = [t.name for t in graph.tasks if t.name.startswith("h2d.x.") and t.name.endswith(".bwd")]
    # Unless the embedding is on the GPU, the first layer's input was gathered on the host.
    first = 0 if "embed" in plan.resident or spec.lowest_trained else 1
    assert sorted(down) == sorted(f"d2h.x.{unit}.m{m}" for unit in units[first:] for m in micro)
    assert sorted(up) == sorted(f"h2d.x.{unit}.m{m}.bwd" for unit in units for m in micro)
    assert not any(t.name.startswith("d2h.x.") for t in compile_evaluation(spec, plan).tasks)


@some
@given(cases())
def test_nothing_but_a_step_changes_what_is_kept(case: Case) -> None:
    for graph in graphs_of(*case)[1:]:
        kept = {b.name for b in graph.buffers.values() if b.carried}
        assert kept.isdisjoint(name for task in graph.tasks for name in task.writes)


@some
@given(cases())
def test_a_save_reads_every_byte_of_the_masters(case: Case) -> None:
    spec, plan = case
    graph = compile_save(spec, plan)
    saves = [task for task in graph.tasks if task.kind is TaskKind.SAVE]
    assert [task.args["unit"] for task in saves] == [unit.name for unit in spec.units]
    read = [b for task in graph.tasks for b in owned(graph, task.reads)]
    assert tiled(read) == whole_state(spec, plan)
    for task in saves:
        unit = spec.unit(str(task.args["unit"]))
        if unit.name in plan.resident:  # brought down first
            (staged,) = (graph.buffers[name] for name in task.reads)
            assert (staged.place, staged.tier, staged.nbytes) == (
                "saved",
                Tier.PINNED,
                (2 if unit.frozen else 4) * unit.numel,
            )


@some
@given(cases())
def test_a_checkpoint_writes_all_state_in_the_order_in_which_a_step_updates_it(case: Case) -> None:
    spec, plan = case
    graph = compile_checkpoint(spec, plan)
    saves = [task for task in graph.tasks if task.kind is TaskKind.SAVE]
    assert list(dict.fromkeys(task.args["unit"] for task in saves)) == [
        unit.name for unit in reversed(spec.units)
    ]
    whole = whole_state(spec, plan)
    assert sum(task.cost.nbytes for task in saves) == sum(whole.values())
    copies = [task for task in graph.tasks if task.op == "snapshot_state"]
    streamed = [b for task in copies or saves for b in owned(graph, task.reads)]
    assert tiled(streamed) == {
        place: nbytes
        for place, nbytes in whole.items()
        if place.partition(".")[2] not in plan.resident
    }
    for name in plan.resident:  # comes down in a few trips through the place that a save has
        trips = [task for task in graph.tasks if task.args["unit"] == name]
        moments = ["m"] if plan.optimizer is Optimizer.LION else ["m", "v"]
        moments += ["scales"] if in_8_bits(spec, plan, name) else []
        parts = ["hi"] if spec.unit(name).frozen else ["hi,lo", *moments]
        assert [task.kind for task in trips] == [TaskKind.D2H, TaskKind.SAVE] * len(parts)
        for down, save in zip(trips[::2], trips[1::2], strict=True):
            assert down.writes == save.reads
            assert down.args["parts"] == save.args["parts"]
            place = f"snapshot.{down.name.removeprefix('d2h.')}" if plan.snapshot else "saved"
            assert graph.buffers[down.writes[0]].place == place
        assert [task.args["parts"] for task in trips[::2]] == parts


@some
@given(cases())
def test_with_a_snapshot_no_update_waits_for_the_disk(case: Case) -> None:
    spec, plan = case
    graph = compile_checkpoint(spec, replace(plan, snapshot=True))
    for task in graph.tasks:
        if task.kind is TaskKind.SAVE:
            assert not any(graph.buffers[name].carried for name in task.reads), task.name
    sizes = [b.nbytes for b in graph.buffers.values() if b.name.startswith("snapshot.")]
    assert sum(sizes) == sum(whole_state(spec, plan).values())


@some
@given(cases())
def test_the_footprint_is_that_of_the_graphs(case: Case) -> None:
    graphs = graphs_of(*case)
    assert footprint(*case) == footprint(*case, graphs[0]) == places(graphs)
    assert draft_step(*case) == graphs[0]


@some
@given(cases())
def test_a_pool_smaller_than_the_need_is_refused(case: Case) -> None:
    spec, plan = case
    need = pool_size(spec, plan)
    for graph in graphs_of(spec, replace(plan, boundary_slots=need)):
        assert sum(name.startswith("x.") for name in graph.slots) in (0, need)
    with pytest.raises(BudgetError, match="x slots are occupied"):
        graphs_of(spec, replace(plan, boundary_slots=need - 1))


@some
@given(cases())
def test_the_vocabulary_does_not_size_the_slots_of_layers(case: Case) -> None:
    spec, plan = case
    largest_layer = max(unit.numel for unit in spec.layers)
    parts = vocab_chunks(spec, plan.vocab_chunks)
    largest_part = max(part.stop - part.start for part in parts) * spec.hidden
    swept = largest_part if len(parts) > 1 else 0
    for name, (_, nbytes) in footprint(spec, plan).items():
        if name.startswith("w.") and name.partition(".")[2].isdigit():
            assert nbytes <= plan.compute.nbytes * max(largest_layer, swept)


@some
@given(cases())
def test_what_is_frozen_has_no_gradient(case: Case) -> None:
    spec, plan = case
    graph = compile_step(spec, plan)
    frozen = {unit.name for unit in spec.units if unit.frozen}
    gradients = [b.name for b in graph.buffers.values() if b.role is Role.GRADIENT]
    assert not [n for n in gradients if n.split(".")[1] in frozen and not n.startswith("dxh.")]
    for task in graph.tasks:
        assert task.kind is not TaskKind.CPU_UPDATE or task.name.split(".")[1] not in frozen
    # Below the lowest trained layer nothing is kept for backward.
    below = {unit.name for unit in spec.layers[: spec.lowest_trained]}
    kept = {n.split(".")[1] for n in graph.buffers if n.startswith(("kept.", "kh."))}
    assert kept.isdisjoint(below)


def test_an_update_of_a_layer_waits_for_its_own_gradient_and_loads_only() -> None:
    graph = compile_step(small_spec(), small_plan(chunk_numel=10_000))
    position = graph.index["update.L01.c0"]
    waits = {graph.tasks[p].name for p in graph.edges.predecessors[position]}
    assert {name for name in waits if not name.startswith("h2d.L01.")} == {"d2h.L01.c0"}


def test_fp32_brings_both_halves_up_and_joins_them() -> None:
    graph = compile_step(small_spec(), small_plan(compute=Compute.FP32))
    up = graph.tasks[graph.index["h2d.L00.fwd.c0"]]
    assert up.op == "upload_halves"
    assert up.reads == ("hi.L00.c0", "state.L00.c0")
    join = graph.tasks[graph.index["join.L00.fwd.c0"]]
    assert join.reads == up.writes
    assert graph.buffers[join.writes[0]].nbytes == graph.buffers[up.writes[0]].nbytes


@pytest.mark.parametrize(
    ("optimizer", "nbytes"),
    [(Optimizer.ADAMW, 26), (Optimizer.LION, 18), (Optimizer.ADAMW8BIT, 14)],
)
def test_an_update_on_the_gpu_moves_gradient_master_and_moments(
    optimizer: Optimizer, nbytes: int
) -> None:
    plan = small_plan(optimizer=optimizer, resident=frozenset({"L01"}))
    graph = compile_step(small_spec(), plan)
    [update] = [task for task in graph.tasks if task.op == "update_on_gpu"]
    numel = int(update.args["end"]) - int(update.args["begin"])
    assert update.cost.nbytes == nbytes * numel
