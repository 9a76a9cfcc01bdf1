"""What bindings share: the form of an operation, and the memory of a run as typed views.

A binding is called once per task and graph with the task and views of its buffers, makes the typed
views it needs, and returns the operation that each step then calls with its `StepContext`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from slideformer.graph.errors import NonFiniteError
from slideformer.graph.model import ModelSpec
from slideformer.graph.plan import Compute, MemoryPlan
from slideformer.graph.step_gradients import CHECK_NBYTES
from slideformer.graph.step_nvme import kind_parts
from slideformer.graph.tasks import Task
from slideformer.models.decoder import DecoderConfig
from slideformer.models.state import UnitState

Operation = Callable[[Any], object]
Views = Mapping[str, Tensor]
Binding = Callable[[Task, Views], Operation]


class ModelMemory:
    """What bindings know of a run beside their task: shapes, and where state lies."""

    def __init__(
        self,
        spec: ModelSpec,
        decoder: DecoderConfig,
        plan: MemoryPlan,
        states: Mapping[str, UnitState],
    ) -> None:
        self.spec = spec
        self.decoder = decoder
        self.plan = plan
        self.states = states
        self.dtype = torch.bfloat16 if plan.compute is Compute.BF16 else torch.float32

    def boundary(self, view: Tensor) -> Tensor:
        """A boundary [micro_rows, seq_len, hidden]."""
        plan = self.plan
        return view.view(self.dtype).view(plan.micro_rows, plan.seq_len, self.spec.hidden)

    def tokens(self, micro: int) -> slice:
        """Positions of a micro-batch's tokens in a step."""
        count = self.plan.micro_tokens
        return slice(micro * count, (micro + 1) * count)

    def weights(self, views: Views, names: Sequence[str], unit: str) -> Tensor:
        """All chunks of ``unit`` among ``names`` as one tensor in the compute dtype."""
        kind = "hi" if unit in self.plan.resident else "w"
        return whole(views, names, f"{kind}.{unit}.").view(self.dtype)

    def accumulators(self, views: Views, names: Sequence[str], unit: str, size: int) -> Tensor:
        """All gradient accumulators of ``unit``, of ``size`` bytes an element, as one tensor."""
        dtype = torch.float32 if size == 4 else torch.bfloat16
        return whole(views, names, f"acc.{unit}.").view(dtype)

    def chunk_state(self, task: Task, views: Views) -> UnitState:
        """The state of the chunk that a task works on, its part from NVMe where that is."""
        begin, end = int(task.args["begin"]), int(task.args["end"])
        state = self.states[str(task.args["unit"])].part(begin, end)
        for name in task.reads:
            if name.startswith("staged."):
                unit, kind = self.spec.unit(str(task.args["unit"])), name.split(".")[1]
                parts = kind_parts(kind, unit, self.plan.optimizer)
                state = state.with_extent(parts, views[name], end - begin)
        return state

    def scale_embedding_(self, rows: Tensor) -> None:
        """Multiply what the embedding looked up, or its gradient, by the model's factor, if any.

        The factor is rounded to the compute dtype first, as transformers does.
        """
        scale = self.decoder.embed_scale
        if scale is not None:
            rows.mul_(float(torch.tensor(scale, dtype=self.dtype)))

    def travelling(self, view: Tensor) -> tuple[Tensor, Tensor]:
        """A travelling gradient chunk: its elements, and the sum of their squares behind them."""
        nbytes = len(view) - CHECK_NBYTES
        return view[:nbytes].view(self.dtype), self.travelling_square(view)

    @staticmethod
    def travelling_square(view: Tensor) -> Tensor:
        """The sum of squares (FP64 scalar) of a travelling gradient chunk."""
        begin = -(-(len(view) - CHECK_NBYTES) // 8) * 8  # where an FP64 may lie
        return view[begin : begin + 8].view(torch.float64)[0]


def whole(views: Views, names: Sequence[str], prefix: str) -> Tensor:
    """The buffers whose names start with ``prefix``, which lie one after another, as one tensor."""
    parts = [views[name] for name in names if name.startswith(prefix)]
    position = parts[0].storage_offset()
    for part in parts:
        assert part.storage_offset() == position, f"{prefix}* are not adjacent"
        position += part.numel()
    return parts[0].as_strided((position - parts[0].storage_offset(),), (1,))


def without_grad(operation: Operation) -> Operation:
    """Run an operation with autograd off, whatever thread it runs on."""

    @functools.wraps(operation)
    def run(context: Any) -> object:
        with torch.no_grad():
            return operation(context)

    return run


def finite(value: float, where: str = "") -> float:
    """``value`` if it is finite; otherwise `NonFiniteError`, which fails the step."""
    if not math.isfinite(value):
        raise NonFiniteError(
            f"{where}the gradient is not finite; nothing was updated from it. Lower the learning "
            "rate, or look at the data of this step"
        )
    return value
