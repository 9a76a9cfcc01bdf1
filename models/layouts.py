"""What the tokens of a micro-batch need to know of each other: rotary tables, and a mask.

Plain rows share tables and masks that are made once; packed rows bring positions and documents of
their own with every step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from slideformer.graph.model import UnitSpec
from slideformer.graph.tasks import Task
from slideformer.models.attention import Mask, window_mask
from slideformer.models.context import StepContext
from slideformer.models.documents import Documents, PackedTensors, packed_tensors
from slideformer.models.layer import Rope
from slideformer.models.model_memory import ModelMemory, Views

Layout = Callable[[StepContext], tuple[Rope, Mask]]


def layer_layout(memory: ModelMemory, task: Task, views: Views, unit: UnitSpec) -> Layout:
    """The layout of one layer's task on one micro-batch."""
    index, decoder = memory.spec.layers.index(unit), memory.decoder
    rope = rope_views(views["rope"], memory)[decoder.rope_of[index]]
    window = decoder.windows[index]
    if memory.plan.packed:
        return _packed_layout(memory, int(task.args["micro"]), views, rope, window)
    size = memory.plan.seq_len
    mask = None
    if window is not None and window < size:
        mask = views[f"mask.{window}"].view(torch.bool).view(size, size)
    return lambda _: (rope, mask)


def _packed_layout(
    memory: ModelMemory, micro: int, views: Views, rope: Rope, window: int | None
) -> Layout:
    """Tables for the tokens' positions in their documents, and those documents."""
    shape = (memory.plan.micro_rows, memory.plan.seq_len, -1)
    tensors = step_documents(memory, views["documents"])
    positions, starts = tensors.positions[memory.tokens(micro)], tensors.starts[micro]

    def layout(context: StepContext) -> tuple[Rope, Mask]:
        lengths = context.packed().lengths[micro]
        cos, sin = (table.index_select(0, positions).view(shape) for table in rope)
        return (cos, sin), Documents(starts[: len(lengths) + 1], lengths, window)

    return layout


def step_documents(memory: ModelMemory, view: Tensor) -> PackedTensors:
    """Positions and document starts of a packed step, in their buffer."""
    return packed_tensors(view, memory.plan.tokens, memory.plan.micro_batches)


def rope_views(view: Tensor, memory: ModelMemory) -> list[Rope]:
    """Cosines and sines, FP32 [seq_len, rotary_dim] each, of every rotary embedding."""
    spec = memory.spec
    tables = view.view(torch.float32).view(spec.ropes, 2, memory.plan.seq_len, spec.rotary_dim)
    return [(cos, sin) for cos, sin in tables]


def fill_constants(views: Views, memory: ModelMemory, ropes: Sequence[Rope]) -> None:
    """Write the tables and masks that all steps share into their buffers."""
    for targets, sources in zip(rope_views(views["rope"], memory), ropes, strict=True):
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)
    seq_len = memory.plan.seq_len
    for window in memory.spec.windows:
        if f"mask.{window}" in views:
            mask = window_mask(seq_len, window, views["rope"].device)
            assert mask is not None
            views[f"mask.{window}"].view(seq_len, seq_len).copy_(mask)
