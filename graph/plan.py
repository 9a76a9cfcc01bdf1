"""Plain data that planning is about: budgets and memory plans."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from slideformer.graph.buffers import Tier
from slideformer.graph.model import ModelSpec


class Compute(StrEnum):
    """The arithmetic of forward and backward."""

    BF16 = "bf16"
    FP32 = "fp32"

    @property
    def nbytes(self) -> int:
        """Bytes of one element of a weight or activation on the GPU."""
        return 2 if self is Compute.BF16 else 4


class Optimizer(StrEnum):
    """The rule of the update; what it keeps of each unit is in ``state.py``."""

    ADAMW = "adamw"
    ADAMW8BIT = "adamw8bit"
    LION = "lion"

    @property
    def moment_nbytes(self) -> int:
        """Bytes per element of its moments; scales are not counted."""
        return {Optimizer.ADAMW: 8, Optimizer.ADAMW8BIT: 2, Optimizer.LION: 4}[self]


UNLIMITED = 1 << 62
"""The budget of memory that has no end, as that of a host which is not at hand."""


@dataclass(frozen=True, slots=True)
class Budgets:
    """Most bytes that may be used: of the GPU (with context), the host (all processes), NVMe.

    Without a GPU its tier lies in host memory: ``gpu`` None divides ``host`` freely between both.
    ``nvme_writes`` bounds the bytes that a step may write to NVMe; None does not.
    """

    gpu: int | None
    host: int
    nvme: int = 0
    nvme_writes: int | None = None


@dataclass(frozen=True)
class MemoryPlan:
    """Where every byte of a run lives, and what decides its rounding.

    The first group of fields is the *numerics* of the run, the second only *places* things: within
    one numerics, trained weights do not depend on the placement.

    ``rows`` × ``seq_len`` tokens make a step, in micro-batches of ``micro_rows`` rows. The output
    matrix is processed in ``vocab_chunks`` chunks of rows against tiles of ``head_tile`` tokens.
    In a ``packed`` run a row may hold several documents, which do not see each other.

    ``window`` layer-sized weight slots are on the GPU; units cross PCIe and are updated in chunks
    of at most ``chunk_numel`` elements. Boundaries (layer inputs) live in ``boundary_slots`` GPU
    slots of one micro-batch each; those of the first ``offloaded`` layers wait for backward in
    pinned memory. Gradients leave through ``staging_slots`` GPU slots and park in
    ``gradient_slots`` pinned slots, the i-th gradient chunk of the step in slot
    ``gradient_slot[i]`` (empty: each in a place of its own, as in a draft).

    The weights and optimizer state of the ``resident`` units stay on the GPU, which also updates
    them. The last ``kept`` layers keep their activations on the GPU from forward to backward,
    ``spilled`` ones of the others keep them in pinned memory, and the rest compute them again.

    The moments of ``nvme_moments`` streamed layers are on NVMe, of ``nvme_lo`` of those the lower
    halves of their masters too, and of ``nvme_hi`` of those again the upper halves, which are their
    BF16 weights. Of the offloaded boundaries those of ``nvme_boundaries`` layers wait for backward
    on NVMe. Each kind passes through ``nvme_slots`` slots in host memory, by chunk or micro-batch,
    but for boundaries with ``nvme_direct``, which the GPU exchanges with NVMe itself.

    ``deferred`` plans update no unit before all gradients of the step are known, and keep these
    parked until then, each in a place of its own.

    With a ``snapshot`` the host has room for all state once more, from which checkpoints are
    written.

    ``peaks`` are predicted peak bytes per tier, overheads included.
    """

    compute: Compute
    rows: int
    seq_len: int
    micro_rows: int
    vocab_chunks: int
    head_tile: int

    window: int
    chunk_numel: int
    offloaded: int
    staging_slots: int
    packed: bool = False
    deferred: bool = False
    optimizer: Optimizer = Optimizer.ADAMW
    resident: frozenset[str] = frozenset()
    kept: int = 0
    spilled: int = 0
    nvme_moments: int = 0
    nvme_lo: int = 0
    nvme_boundaries: int = 0
    nvme_hi: int = 0
    nvme_slots: int = 4
    nvme_direct: bool = False
    snapshot: bool = False
    boundary_slots: int | None = None
    gradient_slots: int = 0
    gradient_slot: tuple[int, ...] = ()
    workspace: int = 0
    peaks: Mapping[Tier, int] = field(default_factory=dict)
    step_seconds: float = 0.0

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a step."""
        return self.rows // self.micro_rows

    @property
    def micro_tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.micro_rows * self.seq_len

    @property
    def tokens(self) -> int:
        """Tokens of a step, padding included."""
        return self.rows * self.seq_len

    @property
    def layer_accumulator(self) -> int:
        """Bytes per element of a layer's gradient accumulator: FP32 where several are added up."""
        several = self.micro_batches > 1 or self.mlp_tile < self.micro_tokens
        return 4 if several else self.compute.nbytes

    @property
    def mlp_tile(self) -> int:
        """Tokens of a micro-batch that a layer's MLP takes at a time."""
        return mlp_tile(self.micro_rows, self.seq_len)

    @property
    def head_accumulator(self) -> int:
        """Bytes per element of the output matrix's accumulator (FP32 over several tiles)."""
        return 4 if self.head_tile < self.micro_tokens else self.layer_accumulator

    def keeps(self, layers: int) -> frozenset[int]:
        """Positions of the layers, of ``layers``, that keep their activations, here or there."""
        first = layers - self.kept
        return self.spills(layers) | frozenset(range(first, layers))

    def spills(self, layers: int) -> frozenset[int]:
        """Positions of the spilled layers: spread evenly, so that each copy has time to finish."""
        first = layers - self.kept
        return frozenset(i * first // self.spilled for i in range(self.spilled))


MLP_TILE = 8192
"""Tokens of a part of a long row in an MLP."""


def mlp_tile(micro_rows: int, seq_len: int) -> int:
    """Tokens that a layer's MLP takes at a time: all of a micro-batch, or a part of one long row.

    The MLP's temporaries are the largest of a layer, and a micro-batch cannot be less than a row.
    Parts this long lose no speed, but for adding up their gradients in FP32.
    """
    long = micro_rows == 1 and seq_len > 2 * MLP_TILE
    return MLP_TILE if long else micro_rows * seq_len


def keeps_attention(spec: ModelSpec, plan: MemoryPlan) -> bool:
    """Whether what layers keep contains the output of attention.

    A fused kernel can go on from there: in BF16, over whole rows without a window, where scores
    have no cap.
    """
    windowed = any(window < plan.seq_len for window in spec.windows)
    plain = not (plan.packed or windowed or spec.softcapped)
    return plan.compute is Compute.BF16 and plain


def kept_nbytes(spec: ModelSpec, plan: MemoryPlan) -> int:
    """Bytes of what a layer keeps of one micro-batch for backward.

    Queries, keys and values, the stream before the MLP, gate and up; and attention's output and
    log-sum-exp (FP32, one a row and head) where they are of use.
    """
    width = (spec.heads + 2 * spec.kv_heads) * spec.head_dim + spec.hidden + 2 * spec.intermediate
    nbytes = width * plan.compute.nbytes
    if keeps_attention(spec, plan):
        nbytes += spec.heads * (spec.head_dim * plan.compute.nbytes + 4)
    return nbytes * plan.micro_tokens
