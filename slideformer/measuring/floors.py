"""How fast a step could be: copies and arithmetic on their own, and the floors that follow.

A step cannot take less than the longest of its parts takes alone. CPU updates are measured in
``update_rates.py``.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

import torch

from slideformer.measuring.stand_in import Arithmetic, StandIn
from slideformer.measuring.update_rates import UPDATE_BYTES, Copies, seconds_of
from slideformer.models.shapes import shape_config


def copy_rates(device: torch.device, nbytes: int) -> dict[str, float]:
    """Bytes per second of copies of ``nbytes``: up, down, and the sum of both together."""
    copies = Copies(device, nbytes)
    return {
        "h2d": copies.rate("h2d"),
        "d2h": copies.rate("d2h"),
        "both": copies.rate("h2d", "d2h"),
    }


def compute_seconds(
    shape: str, sizes: Arithmetic, device: torch.device, steps: int
) -> dict[str, Any]:
    """Seconds of a step's forward, recompute and backward on weights that are on the device.

    What a plan keeps from forward to backward is not computed again here either.

    One layer's weights stand for all layers': each micro-batch passes as many layers as the model
    has, then the norm, the whole output matrix in one sweep, and the layers backwards. Nothing is
    copied and nothing updated. Returns the median of ``steps`` steps after one more, and of the
    parts of the last.
    """
    stand_in = StandIn(shape_config(shape), sizes, device)
    times = []
    with torch.no_grad():
        for _ in range(steps + 1):
            times.append(seconds_of(stand_in.step, device))
        parts = {
            "forward_layer": seconds_of(stand_in.forward, device),
            "backward_layer": seconds_of(stand_in.backward, device),
            "head": seconds_of(stand_in.head, device),
        }
    return {"step_seconds": statistics.median(times[1:]), "micro_batch_seconds": parts}


def floors_of_step(
    traffic: Mapping[str, Mapping[str, float]],
    copies: Mapping[str, float],
    updates: Mapping[str, Any],
    compute: float,
) -> dict[str, float]:
    """Seconds below which no step can be, per resource.

    ``traffic`` has per lane the bytes (``nbytes``) and updated parameters (``params``) of a step.
    Host memory: each update moves 26 bytes a parameter and each copied byte crosses it once, at the
    rate of the read-modify-write loop. Updates: at the rate reached beside copies, if known.
    """
    up, down = (traffic[lane]["nbytes"] if lane in traffic else 0 for lane in ("h2d", "d2h"))
    params = traffic["cpu"]["params"] if "cpu" in traffic else 0
    rates = updates["params_per_second"]
    host_bytes = UPDATE_BYTES * params + up + down
    return {
        "compute": compute,
        "h2d": up / copies["h2d"],
        "d2h": down / copies["d2h"],
        "both_ways": (up + down) / copies["both"],
        "update": params / rates.get("adamw_busy", rates["adamw"]),
        "host_memory": host_bytes / updates["stream_bytes_per_second"],
    }
