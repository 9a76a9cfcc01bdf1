"""Graphs that bring a model's state to disk: its weights for a save, all for a checkpoint.

Both read carried buffers only, so the next step's update of a unit, or of a chunk, is all that ever
waits for them. A checkpoint goes through the units as backward does, which is the order in which
they were updated last and will be updated next. State that is not in host memory passes through the
places that a save has anyway: `saved` for units on the GPU, the staging slots for what is on NVMe.
With room for a ``snapshot`` all state is copied there first, so that updates wait for host memory
and not for the disk.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from slideformer.graph.buffers import Role, Tier
from slideformer.graph.chunks import Chunk
from slideformer.graph.model import ModelSpec, UnitSpec
from slideformer.graph.plan import MemoryPlan
from slideformer.graph.state import HALVES, Part, parts_nbytes, state_parts
from slideformer.graph.step_memory import StepMemory
from slideformer.graph.tasks import Cost, TaskKind

_TRIPS = (("master", ("hi", "lo")), ("m", ("m",)), ("v", ("v",)), ("scales", ("scales",)))
"""How a resident unit's state comes down: 4 bytes per element a time, as a save's place holds."""


def write_save(spec: ModelSpec, plan: MemoryPlan) -> StepMemory:
    """Units on the GPU come down one after another to one place in pinned memory."""
    memory = StepMemory(spec, plan, "save")
    for unit in spec.saved_units:
        chunks = memory.chunks[unit.name]
        weights = [name for c in chunks for name in memory.owned(c)]
        weights += memory.stored.read_master(unit)
        parts = state_parts(unit, plan.compute, plan.optimizer)
        halves = [part for part in parts if part in HALVES]
        if memory.resident(unit.name):
            weights = [_bring_down(memory, unit, "save", halves)]
        memory.task(
            f"save.{unit.name}",
            TaskKind.SAVE,
            reads=weights,
            cost=Cost(nbytes=parts_nbytes(halves, unit.numel)),
            unit=unit.name,
        )
    return memory


def write_checkpoint(spec: ModelSpec, plan: MemoryPlan) -> StepMemory:
    """Streamed units go chunk by chunk, resident ones as a whole in a few trips."""
    memory = StepMemory(spec, plan, "checkpoint")
    for unit in reversed(spec.saved_units):
        if memory.resident(unit.name):
            _save_resident(memory, unit)
            continue
        parts = state_parts(unit, plan.compute, plan.optimizer)
        for chunk in memory.chunks[unit.name]:
            owned = [*memory.owned(chunk), *memory.stored.read(chunk)]
            if plan.snapshot:
                owned = [_snapshot(memory, chunk, owned, parts)]
            memory.task(
                f"save.{unit.name}.{chunk.label}",
                TaskKind.SAVE,
                op="save_staged" if plan.snapshot else "save_state",
                reads=owned,
                cost=Cost(nbytes=parts_nbytes(parts, chunk.numel)),
                unit=unit.name,
                begin=chunk.begin,
                end=chunk.end,
                parts=_names(parts),
            )
    return memory


def _names(parts: Iterable[Part]) -> str:
    return ",".join(part.name for part in parts)


def _snapshot(memory: StepMemory, chunk: Chunk, owned: Sequence[str], parts: Sequence[Part]) -> str:
    name, nbytes = f"snapshot.{chunk.unit}.{chunk.label}", parts_nbytes(parts, chunk.numel)
    copy = memory.buffer(name, nbytes, Tier.CPU, Role.OPTIMIZER)
    memory.task(
        name,
        TaskKind.CPU,
        op="snapshot_state",
        reads=owned,
        writes=[copy],
        cost=Cost(nbytes=2 * nbytes),
        unit=chunk.unit,
        begin=chunk.begin,
        end=chunk.end,
        parts=_names(parts),
    )
    return copy


def _save_resident(memory: StepMemory, unit: UnitSpec) -> None:
    has = state_parts(unit, memory.plan.compute, memory.plan.optimizer)
    for trip, names in _TRIPS:
        parts = [part for part in has if part.name in names]
        if not parts:
            continue
        memory.task(
            f"save.{unit.name}.{trip}",
            TaskKind.SAVE,
            op="save_staged",
            reads=[_bring_down(memory, unit, trip, parts)],
            cost=Cost(nbytes=parts_nbytes(parts, unit.numel)),
            unit=unit.name,
            begin=0,
            end=unit.numel,
            parts=_names(parts),
        )


def _bring_down(memory: StepMemory, unit: UnitSpec, trip: str, parts: Sequence[Part]) -> str:
    nbytes = parts_nbytes(parts, unit.numel)
    assert nbytes <= max(4 * unit.numel, 8)
    snapshot = memory.plan.snapshot and trip != "save"
    staged = memory.buffer(
        f"{'snapshot' if snapshot else 'saved'}.{unit.name}.{trip}",
        nbytes,
        Tier.PINNED,
        Role.WEIGHT,
        slot="" if snapshot else "saved",
    )
    memory.task(
        f"d2h.{unit.name}.{trip}",
        TaskKind.D2H,
        op="download_state",
        reads=[name for chunk in memory.chunks[unit.name] for name in memory.owned(chunk)],
        writes=[staged],
        cost=Cost(nbytes=nbytes),
        unit=unit.name,
        begin=0,
        end=unit.numel,
        parts=_names(parts),
    )
    return staged
