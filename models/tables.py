"""All bindings of a model's tasks, put together."""

from __future__ import annotations

from slideformer.models.bindings import Binding, ModelMemory, StreamOps
from slideformer.models.clip_ops import ClipOps
from slideformer.models.head_ops import HeadOps
from slideformer.models.resident_ops import ResidentOps
from slideformer.models.save_ops import SaveOps
from slideformer.models.update_ops import UpdateOps


def model_bindings(
    memory: ModelMemory,
    threads: int,
    clip: ClipOps,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> dict[str, Binding]:
    """Op name → binding; ``threads`` are those of updates on the CPU.

    ``label_smoothing`` and ``z_loss`` shape the loss that is trained.
    """
    return {
        **StreamOps(memory).table(),
        **HeadOps(memory, label_smoothing=label_smoothing, z_loss=z_loss).table(),
        **UpdateOps(memory, threads).table(),
        **ResidentOps(memory, threads).table(),
        **SaveOps(memory).table(),
        **clip.table(),
    }
