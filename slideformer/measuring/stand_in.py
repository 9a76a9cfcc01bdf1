"""One layer and the output matrix with random weights: the arithmetic of a step, without the rest.

Nothing is copied and nothing updated; measuring it is the caller's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PretrainedConfig

from slideformer.graph.plan import Compute, MemoryPlan, kept_nbytes
from slideformer.kernels.cross_entropy import LossForm
from slideformer.kernels.rms_norm import rms_norm, rms_norm_backward
from slideformer.models import layer
from slideformer.models.attention import window_mask
from slideformer.models.families import decoder_config
from slideformer.models.head import head_loss_and_grad
from slideformer.models.layer_memory import Kept, kept_views
from slideformer.models.operands import operands
from slideformer.models.rotary import rope_tables
from slideformer.models.units import model_spec


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """What decides the cost of a step's arithmetic; as in `MemoryPlan`."""

    rows: int
    seq_len: int
    micro_rows: int
    head_tile: int
    compute: str
    kept: int = 0


class StandIn:
    """One layer and the head of a shape, with one micro-batch of inputs."""

    def __init__(self, config: PretrainedConfig, sizes: Arithmetic, device: torch.device) -> None:
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
        # Values as in training: zeros, or what is not finite, would take less power, hence time.
        self._y, self._dy, self._first_dy = (random(*self._x.shape) for _ in range(3))
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
                kept_nbytes(self._spec, plan_of(sizes)), dtype=torch.uint8, device=device
            )
            self._kept = kept_views(flat, self._cfg, sizes.micro_rows, sizes.seq_len, dtype)

    def forward(self, kept: bool = False) -> None:
        """One micro-batch through the layer; ``kept`` as in a plan that keeps its activations."""
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
        """What is computed again of that, and its gradients."""
        self._dy.copy_(self._first_dy)  # backward leaves the input's there, which would grow
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
        """Norm, output matrix and loss of a micro-batch, with gradients."""
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
            form=LossForm(softcap=cfg.final_softcap),
        )
        rms_norm_backward(dx, x, self._norm, rstd, out=dx, centred=cfg.centred)

    def step(self) -> None:
        """As many layers as the model has, the loss, and back."""
        layers = range(len(self._spec.layers))
        for index in layers:
            for _ in range(self._micro_batches):
                self.forward(index >= self._plain)
        for _ in range(self._micro_batches):
            self.head()
        for index in reversed(layers):
            for _ in range(self._micro_batches):
                self.backward(index >= self._plain)


def plan_of(sizes: Arithmetic) -> MemoryPlan:
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
