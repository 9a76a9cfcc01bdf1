"""Bindings that bring state to disk: weights into a Hugging Face folder, all into a checkpoint.

What cannot be written harms no weights, so it is noted in the context and does not fail the run.
"""

from __future__ import annotations

from torch import Tensor

from slideformer.graph.errors import CheckpointError
from slideformer.graph.state import Part, state_parts
from slideformer.graph.tasks import Task
from slideformer.kernels.adamw import stream_copy
from slideformer.models.context import CheckpointContext, SaveContext
from slideformer.models.model_memory import Binding, ModelMemory, Operation, Views
from slideformer.models.state import UnitState, arrays


class SaveOps:
    """Downloads of resident units, snapshots on ``threads`` threads, hand-overs to the writers."""

    def __init__(self, memory: ModelMemory, threads: int) -> None:
        self._memory = memory
        self._threads = threads

    def table(self) -> dict[str, Binding]:
        """Op name → binding."""
        return {
            "download_state": self.download_state,
            "snapshot_state": self.snapshot_state,
            "save": self.save,
            "save_state": self.save_state,
            "save_staged": self.save_staged,
        }

    def download_state(self, task: Task, views: Views) -> Operation:
        """Bring parts of a resident unit's state down, one behind another."""
        pairs = self._pairs(task, self._memory.states[str(task.args["unit"])], views)

        def run(_: object) -> None:
            for target, source in pairs:
                target.copy_(source, non_blocking=True)

        return run

    def snapshot_state(self, task: Task, views: Views) -> Operation:
        """Copy all of a chunk's state in host memory, one part behind another."""
        pairs = self._pairs(task, self._memory.chunk_state(task, views), views)

        def run(_: object) -> None:
            for target, source in pairs:
                stream_copy(target, source, self._threads)

        return run

    def save(self, task: Task, views: Views) -> Operation:
        """Hand a unit to the writer of a Hugging Face folder."""
        unit = str(task.args["unit"])

        def run(context: SaveContext) -> None:
            if context.errors:  # the writer is of no more use
                return
            try:
                context.writer.write_unit(unit)
            except CheckpointError as error:
                context.errors.append(error)

        return run

    def save_state(self, task: Task, views: Views) -> Operation:
        """Write all of a chunk's state into a checkpoint."""
        state = self._memory.chunk_state(task, views)
        return _write(task, {part.name: getattr(state, part.name) for part in self._parts(task)})

    def save_staged(self, task: Task, views: Views) -> Operation:
        """Write what `download_state` or `snapshot_state` put in place into a checkpoint."""
        return _write(task, self._views(task, views[task.reads[0]]))

    def _pairs(self, task: Task, state: UnitState, views: Views) -> list[tuple[Tensor, Tensor]]:
        """Where each part goes, and the part."""
        targets = self._views(task, views[task.writes[0]])
        return [(target, getattr(state, part)) for part, target in targets.items()]

    def _views(self, task: Task, place: Tensor) -> dict[str, Tensor]:
        """The arrays of a task that lie one behind another in a place."""
        return arrays(place, self._parts(task), int(task.args["end"]) - int(task.args["begin"]))

    def _parts(self, task: Task) -> list[Part]:
        memory, names = self._memory, str(task.args["parts"]).split(",")
        unit = memory.spec.unit(str(task.args["unit"]))
        parts = state_parts(unit, memory.plan.compute, memory.plan.optimizer)
        return [part for part in parts if part.name in names]


def _write(task: Task, parts: dict[str, Tensor]) -> Operation:
    unit, begin = str(task.args["unit"]), int(task.args["begin"])

    def run(context: CheckpointContext) -> None:
        if context.errors:
            return
        try:
            context.sink.write(unit, begin, parts)
        except CheckpointError as error:
            context.errors.append(error)

    return run
