"""Bindings that bring state to disk: weights into a Hugging Face folder, all into a checkpoint.

What cannot be written harms no weights, so it is noted in the context and does not fail the run.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from slideformer.graph.errors import CheckpointError
from slideformer.graph.step_save import STATE_PARTS, parts_nbytes
from slideformer.graph.tasks import Task
from slideformer.models.context import CheckpointContext, SaveContext
from slideformer.models.model_memory import Binding, ModelMemory, Operation, Views
from slideformer.models.state import STATE_DTYPES, UnitState


class SaveOps:
    """Downloads of resident units, and hand-overs to the writers."""

    def __init__(self, memory: ModelMemory) -> None:
        self._memory = memory

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
        state = self._memory.states[str(task.args["unit"])]
        return _copy(task, state, views)

    def snapshot_state(self, task: Task, views: Views) -> Operation:
        """Copy all of a chunk's state in host memory, one part behind another."""
        return _copy(task, self._memory.chunk_state(task, views), views)

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
        arrays = {part: getattr(state, part) for part in STATE_PARTS}
        parts = {part: values for part, values in arrays.items() if len(values)}
        return _write(task, int(task.args["begin"]), parts)

    def save_staged(self, task: Task, views: Views) -> Operation:
        """Write what `download_state` or `snapshot_state` put in place into a checkpoint."""
        parts = dict(_parts(task, views[task.reads[0]]))
        return _write(task, int(task.args["begin"]), parts)


def _copy(task: Task, state: UnitState, views: Views) -> Operation:
    pairs = [(target, getattr(state, part)) for part, target in _parts(task, views[task.writes[0]])]

    def run(_: object) -> None:
        for target, source in pairs:
            target.copy_(source, non_blocking=True)

    return run


def _write(task: Task, begin: int, parts: dict[str, Tensor]) -> Operation:
    unit = str(task.args["unit"])

    def run(context: CheckpointContext) -> None:
        if context.errors:
            return
        try:
            for part, values in parts.items():
                context.sink.write(unit, part, begin, values)
        except CheckpointError as error:
            context.errors.append(error)

    return run


def _parts(task: Task, view: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The parts that lie one behind another in a place, each in its dtype."""
    names = str(task.args["parts"]).split(",")
    numel = view.numel() // parts_nbytes(names)
    for name, values in zip(
        names, view.split([numel * STATE_PARTS[name] for name in names]), strict=True
    ):
        yield name, values.view(STATE_DTYPES[name])
