"""Measures the floors of one row in a process of its own, while nothing else runs."""

from __future__ import annotations

from typing import Any

from slideformer.measuring.floors import compute_seconds, copy_rates, floors_of_step
from slideformer.measuring.stand_in import Arithmetic
from slideformer.measuring.trial import torch_device
from slideformer.measuring.update_rates import update_rates
from slideformer.this_machine import default_threads

_ROUNDS = 9


class Floors:
    """Answers the requests of a benchmark."""

    def measure(
        self,
        device: str,
        shape: str,
        sizes: dict[str, Any],
        traffic: dict[str, Any],
        threads: int | None,
        update_numel: int,
        copy_nbytes: int,
        steps: int,
    ) -> dict[str, Any]:
        """Copies, updates, arithmetic, and the floors of a step that moves ``traffic``."""
        where = torch_device(device)
        copies = copy_rates(where, copy_nbytes)
        updates = update_rates(
            where, update_numel, threads or default_threads(), _ROUNDS, copy_nbytes
        )
        compute = compute_seconds(shape, Arithmetic(**sizes), where, steps)
        return {
            "copies": copies,
            "updates": updates,
            "compute": compute,
            "floors": floors_of_step(traffic, copies, updates, compute["step_seconds"]),
        }
