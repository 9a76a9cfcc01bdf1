"""The numerics of a run: what decides its rounding, as plain values to save and to compare.

Two runs of one config, data and seed whose numerics are equal should end in the same weights.
Nothing here changes a setting.
"""

from __future__ import annotations

import torch

from slideformer.graph.plan import MemoryPlan
from slideformer.kernels.adamw_library import kernel_build

PLACEMENT = ("kept", "spilled")
"""Of the numerics what should not matter, as it spares a recomputation by the same kernels."""


def numerics_of(plan: MemoryPlan, device: torch.device) -> dict[str, str | int]:
    """What decides the rounding of a run by ``plan`` on ``device``, in this process.

    The CPU stands for itself by the instructions and the threads that PyTorch uses.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        threads = torch.get_num_threads()  # sums are divided among them
        name = f"CPU with {torch.backends.cpu.get_cpu_capability()}, {threads} operator threads"
    return {
        "compute": plan.compute.value,
        "micro_rows": plan.micro_rows,
        "vocab_chunks": plan.vocab_chunks,
        "head_tile": plan.head_tile,
        "mlp_tile": plan.mlp_tile,
        "kept": plan.kept,
        "spilled": plan.spilled,
        "attention": "documents" if plan.packed else "sdpa",
        "kernels": kernel_build(),
        "device": name,
        "torch": str(torch.__version__),
    }
