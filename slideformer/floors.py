"""How fast a step could be: copies and arithmetic on their own, and the floors that follow.

A step cannot take less than the longest of its parts takes alone. CPU updates are measured in
``update_rates.py``.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slideformer.graph.plan import Compute, MemoryPlan, kept_nbytes
from slideformer.kernels.rms_norm import rms_norm, rms_norm_backward
from slideformer.models import layer
from slideformer.models.attention import window_mask
from slideformer.models.families import decoder_config
from slideformer.models.head import head_loss_and_grad
from slideformer.models.layer_memory import Kept, kept_views
from slideformer.models.operands import operands
from slideformer.models.rotary import rope_tables
from slideformer.models.shapes import shape_config
from slideformer.models.units import model_spec
from slideformer.update_rates import UPDATE_BYTES, Copies, seconds_of


def copy_rates(device: torch.device, nbytes: int) -> dict[str, float]:
    """Bytes per second of copies of ``nbytes``: up, down, and the sum of both together."""
    copies = Copies(device, nbytes)
    return {
        "h2d": copies.rate("h2d"),
        "d2h": copies.rate("d2h"),
        "both": copies.rate("h2d", "d2h"),
    }


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """What decides the cost of a step's arithmetic; as in `MemoryPlan`."""

    rows: int
    seq_len: int
    micro_rows: int
    head_tile: int
    compute: str
    kept: int = 0


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
    stand_in = _StandIn(shape, sizes, device)
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


def _plan(sizes: Arithmetic) -> MemoryPlan:
    """A plan of that arithmetic that places nothing."""
    return MemoryPlan(
        compute=Compute(sizes.compute),
        rows=sizes.rows,
        seq_len=sizes.seq_len,
        micro_rows=sizes.micro_rows,
        vocab_chunks=1,
        head_tile=sizes.head_tile,
        window=2,
        chunk_numel=1,
        offloaded=0,
        staging_slots=1,
    )


class _StandIn:
    """One layer and the head of a shape, with one micro-batch of inputs."""

    def __init__(self, shape: str, sizes: Arithmetic, device: torch.device) -> None:
        config = shape_config(shape)
        self._spec, self._cfg = model_spec(config), decoder_config(config)
        self._micro_batches = sizes.rows // sizes.micro_rows
        self._tile = sizes.head_tile
        dtype = torch.bfloat16 if sizes.compute == "bf16" else torch.float32
        several = self._micro_batches > 1
        tokens, hidden = sizes.micro_rows * sizes.seq_len, self._spec.hidden
        acc = torch.float32 if several else dtype
        head_acc = torch.float32 if several or self._tile < tokens else dtype
        unit = self._spec.layers[0]

        def random(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device).normal_(std=0.02)

        self._weights = operands(random(unit.numel), unit)
        self._grads = operands(torch.zeros(unit.numel, dtype=acc, device=device), unit)
        self._matrix = random(self._spec.vocab, hidden)
        self._matrix_grad = torch.zeros_like(self._matrix, dtype=head_acc)
        self._norm = random(hidden)
        self._x = random(sizes.micro_rows, sizes.seq_len, hidden)
        self._y, self._dy = torch.empty_like(self._x), random(*self._x.shape)
        self._targets = torch.randint(self._spec.vocab, (tokens,), device=device)
        self._loss = torch.zeros((), device=device)
        kind = self._cfg.rope_kinds[self._cfg.rope_of[0]]
        self._rope = rope_tables(config, sizes.seq_len, device, kind)
        self._mask = window_mask(sizes.seq_len, self._cfg.windows[0], device)
        self._several = several
        self._plain = len(self._spec.layers) - sizes.kept
        self._kept: Kept | None = None
        if sizes.kept:  # one buffer stands for all
            flat = torch.zeros(
                kept_nbytes(self._spec, _plan(sizes)), dtype=torch.uint8, device=device
            )
            self._kept = kept_views(flat, self._cfg, sizes.micro_rows, sizes.seq_len, dtype)

    def forward(self, kept: bool = False) -> None:
        layer.forward(
            self._x,
            self._weights,
            self._cfg,
            self._rope,
            mask=self._mask,
            out=self._y,
            kept=self._kept if kept else None,
        )

    def backward(self, kept: bool = False) -> None:
        layer.backward(
            self._x,
            self._dy,
            self._weights,
            self._grads,
            self._cfg,
            self._rope,
            accumulate=self._several,
            mask=self._mask,
            kept=self._kept if kept else None,
        )

    def head(self) -> None:
        x = self._y.view(-1, self._spec.hidden)
        dx = self._dy.view(-1, self._spec.hidden)
        cfg = self._cfg
        normed, rstd = rms_norm(x, self._norm, cfg.norm_eps, centred=cfg.centred)
        head_loss_and_grad(
            normed,
            self._matrix,
            self._targets,
            1.0 / len(x),
            self._loss,
            dx,
            self._matrix_grad,
            accumulate_dw=self._several,
            tile=self._tile,
            softcap=cfg.final_softcap,
        )
        rms_norm_backward(dx, x, self._norm, rstd, out=dx, centred=cfg.centred)

    def step(self) -> None:
        layers = range(len(self._spec.layers))
        for index in layers:
            for _ in range(self._micro_batches):
                self.forward(index >= self._plain)
        for _ in range(self._micro_batches):
            self.head()
        for index in reversed(layers):
            for _ in range(self._micro_batches):
                self.backward(index >= self._plain)


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
