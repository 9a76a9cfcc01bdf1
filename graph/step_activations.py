"""Activations of a step: boundaries between layers, and what layers keep for backward.

Both pass through pools of equal slots, handed out in program order. What does not stay on the GPU
until backward needs it goes down to pinned memory and comes up again.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from slideformer.graph.buffers import Role, Tier
from slideformer.graph.placing import SlotPool
from slideformer.graph.plan import kept_nbytes
from slideformer.graph.step_nvme import boundaries_on_nvme
from slideformer.graph.tasks import TaskKind

if TYPE_CHECKING:
    from slideformer.graph.step_memory import StepMemory

SPILL_SLOTS = 3
"""GPU slots through which spilled activations pass: one computed, one copied, one free."""


class Activations:
    """Declares those buffers and appends their copies.

    ``boundaries`` and ``kept`` map (unit, micro-batch) to the buffer that holds them now; the
    gradients of boundaries are under ``dx``.
    """

    def __init__(self, memory: StepMemory) -> None:
        self._memory = memory
        self._spec, self._plan = memory.spec, memory.plan
        ring = SPILL_SLOTS if self._plan.spilled else 0
        self._pool = SlotPool("x", self._plan.boundary_slots)
        self._kept_pool = SlotPool("kept", self._plan.kept * self._plan.micro_batches + ring)
        self._stored = frozenset(boundaries_on_nvme(self._spec, self._plan))
        self._pool_slot: dict[str, tuple[SlotPool, str]] = {}
        self.boundaries: dict[tuple[str, int], str] = {}
        self.kept: dict[tuple[str, int], str] = {}

    @cached_property
    def nbytes(self) -> int:
        """Bytes of one micro-batch's boundary [micro_rows, seq_len, hidden]."""
        return self._plan.micro_tokens * self._spec.hidden * self._plan.compute.nbytes

    def slots(self) -> dict[str, int]:
        """Name and bytes of every slot of both pools."""
        return {name: self.nbytes for name in self._pool.names()} | {
            name: self.kept_nbytes for name in self._kept_pool.names()
        }

    # -- boundaries ------------------------------------------------------------------------------

    def boundary(self, unit: str, m: int, suffix: str = "") -> str:
        """A new boundary on a slot of the pool, put in `boundaries`; `release` gives it back."""
        slot = self._pool.acquire()
        name = f"x.{unit}.m{m}{suffix}"
        buffer = self._memory.buffer(name, self.nbytes, Tier.GPU, Role.ACTIVATION, slot=slot)
        self._pool_slot[buffer] = (self._pool, slot)
        self.boundaries[unit, m] = buffer
        return buffer

    def boundary_gradient(self, m: int) -> None:
        """The gradient of a micro-batch's boundary, entered in `boundaries` as ``dx``.

        Those of a resident embedding lie one after another, as its update reads them all.
        """
        if not self._memory.resident("embed"):
            self.boundary("dx", m)
            return
        nbytes = self.nbytes
        self.boundaries["dx", m] = self._memory.buffer(
            f"x.dx.m{m}", nbytes, Tier.GPU, Role.GRADIENT, slot="dx", offset=m * nbytes
        )

    def release(self, buffer: str) -> None:
        """The last access to a boundary or to kept activations has been written down."""
        if buffer in self._pool_slot:
            pool, slot = self._pool_slot[buffer]
            pool.release(slot)

    def host_boundary(self, unit: str, m: int) -> str:
        """Place of a layer's input in pinned memory."""
        return self._host_boundary(f"xh.{unit}.m{m}", unit, m)

    def host_boundary_gradient(self, unit: str, m: int) -> str:
        """Gradient of that input; takes its place."""
        return self._host_boundary(f"dxh.{unit}.m{m}", unit, m)

    def _host_boundary(self, name: str, unit: str, m: int) -> str:
        nbytes = self.nbytes
        return self._memory.buffer(
            name, nbytes, Tier.PINNED, Role.ACTIVATION, slot=f"xh.{unit}", offset=m * nbytes
        )

    def offload_boundary(self, unit: str, m: int, boundary: str) -> None:
        """Bring a boundary down, to wait for backward in pinned memory or on NVMe."""
        if unit in self._stored:
            self._memory.stored.put_away(f"x.{unit}.m{m}", boundary, self.nbytes)
            return
        self._memory.copy(f"d2h.x.{unit}.m{m}", TaskKind.D2H, boundary, self.host_boundary(unit, m))

    def reload_boundary(self, unit: str, m: int) -> None:
        """Bring an offloaded boundary up again for backward."""
        boundary = self.boundary(unit, m, ".bwd")
        if unit in self._stored:
            self._memory.stored.bring_back(f"x.{unit}.m{m}", boundary, self.nbytes)
            return
        self._memory.copy(
            f"h2d.x.{unit}.m{m}.bwd", TaskKind.H2D, self.host_boundary(unit, m), boundary
        )

    # -- activations kept from forward to backward -----------------------------------------------

    @cached_property
    def kept_nbytes(self) -> int:
        """Bytes of what a layer keeps of one micro-batch."""
        return kept_nbytes(self._spec, self._plan)

    def keep(self, unit: str, m: int, suffix: str = "") -> str:
        """A place on the GPU for what a layer keeps, entered in `kept`."""
        slot = self._kept_pool.acquire()
        buffer = self._memory.buffer(
            f"kept.{unit}.m{m}{suffix}",
            self.kept_nbytes,
            Tier.GPU,
            Role.ACTIVATION,
            slot=slot,
        )
        self._pool_slot[buffer] = (self._kept_pool, slot)
        self.kept[unit, m] = buffer
        return buffer

    def spill(self, unit: str, m: int) -> None:
        """Bring kept activations down, to wait for backward in pinned memory."""
        kept = self.kept[unit, m]
        self._memory.copy(f"d2h.kept.{unit}.m{m}", TaskKind.D2H, kept, self._host_kept(unit, m))
        self.release(kept)

    def reload_kept(self, unit: str, m: int) -> None:
        """Bring spilled activations up again for backward."""
        kept = self.keep(unit, m, ".bwd")
        host = self._host_kept(unit, m)
        self._memory.copy(f"h2d.kept.{unit}.m{m}.bwd", TaskKind.H2D, host, kept)

    def _host_kept(self, unit: str, m: int) -> str:
        nbytes = self.kept_nbytes
        return self._memory.buffer(
            f"kh.{unit}.m{m}",
            nbytes,
            Tier.PINNED,
            Role.ACTIVATION,
            slot=f"kh.{unit}",
            offset=m * nbytes,
        )
