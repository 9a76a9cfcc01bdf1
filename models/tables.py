"""All bindings of a model's tasks, put together."""

from __future__ import annotations

from slideformer.models.bindings import Binding, ModelMemory, StreamOps
from slideformer.models.clip_ops import ClipOps
from slideformer.models.head_ops import HeadOps
from slideformer.models.resident_ops import ResidentOps
from slideformer.models.save_ops import SaveOps
from slideformer.models.update_ops import UpdateOps


def model_bindings(memory: ModelMemory, threads: int, clip: ClipOps) -> dict[str, Binding]:
    """Op name → binding; ``threads`` are those of updates on the CPU."""
    return {
        **StreamOps(memory).table(),
        **HeadOps(memory).table(),
        **UpdateOps(memory, threads).table(),
        **ResidentOps(memory, threads).table(),
        **SaveOps(memory).table(),
        **clip.table(),
    }
