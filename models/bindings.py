"""What the tasks of a step do: op name → the binding that makes the callable.

``stream_ops.py`` has copies, the embedding and the layers, ``head_ops.py`` the output matrix and
the loss, ``update_ops.py``, ``resident_ops.py`` and ``clip_ops.py`` everything that changes
weights, and ``save_ops.py`` what brings them to disk.
"""

from __future__ import annotations

from slideformer.models.clip_ops import ClipOps
from slideformer.models.head_ops import HeadOps
from slideformer.models.model_memory import Binding, ModelMemory
from slideformer.models.resident_ops import ResidentOps
from slideformer.models.save_ops import SaveOps
from slideformer.models.stream_ops import StreamOps
from slideformer.models.update_ops import UpdateOps


def model_bindings(
    memory: ModelMemory, threads: int, clip: ClipOps, label_smoothing: float, z_loss: float
) -> dict[str, Binding]:
    """Op name → binding; ``threads`` are those of updates and snapshots on the CPU.

    ``label_smoothing`` and ``z_loss`` shape the loss that is trained.
    """
    return {
        **StreamOps(memory).table(),
        **HeadOps(memory, label_smoothing, z_loss).table(),
        **UpdateOps(memory, threads).table(),
        **ResidentOps(memory, threads).table(),
        **SaveOps(memory, threads).table(),
        **clip.table(),
    }
