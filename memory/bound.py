"""How long a step must take under a plan: the busiest lane's work, in closed form.

One decoder layer stands for all, so that the bound of a hundred thousand plans takes as long as
simulating one. It ranks candidates; the plan that is chosen is then simulated.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from slideformer.graph.adapters import backward_nbytes, forward_nbytes
from slideformer.graph.model import ModelSpec
from slideformer.graph.plan import MemoryPlan, kept_nbytes
from slideformer.graph.products import backward_products, forward_products, head_products
from slideformer.graph.profile import MachineProfile
from slideformer.graph.step_update import update_nbytes
from slideformer.graph.tasks import Lane
from slideformer.memory.lattice import Counts
from slideformer.memory.layout import Ints
from slideformer.memory.nvme_needs import Sizes

Seconds = NDArray[np.float64]

OVERLAP_LOSS = 0.12
"""Share of the second busiest lane that even a good order leaves exposed, if it is as busy as the
busiest."""

OVERLAP_FADE = 8
"""The power of how busy the one is beside the other with which that share falls: a lane that has
time left makes up for what it could not overlap."""

NARROW_LOSS = 0.005
"""What a window of two units costs: a load starts only when the unit before last is done."""

LAUNCH_SECONDS = 60e-6 * 40
"""What launching one layer's kernels on one micro-batch takes at least, forward and backward."""

TASK_SECONDS = 200e-6
"""What each task of a layer and micro-batch takes beside its work: deciding, launching, ending."""


class Bound:
    """Seconds of a step that no order can go below, and a little for imperfect overlap.

    For points on the base of ``base``, whose own counts do not matter.
    """

    def __init__(self, spec: ModelSpec, base: MemoryPlan, profile: MachineProfile) -> None:
        profile = profile.shared
        self._spec, self._base, self._profile = spec, base, profile
        self._layers, layer = len(spec.layers), spec.layers[0]
        self._layer, self._micro = layer.numel, base.micro_batches
        rates = profile.products
        one = rates.seconds(forward_products(spec, layer, base.micro_rows, base.seq_len))
        one += forward_nbytes(spec, layer, base) / profile.gpu_copy
        self._forward = self._micro * one
        units = (spec.embed, *spec.layers)
        self._resident = np.cumsum([0, *(unit.numel for unit in units)])
        self._resident_trained = np.cumsum([0, *(u.numel * (not u.frozen) for u in units)])
        self._trained = sum(unit.numel for unit in spec.units if not unit.frozen)
        adapters = sum(unit.numel for unit in spec.adapters.values() if unit.name in base.resident)
        self._resident += adapters
        self._resident_trained += adapters
        again, spared = [], [0.0]
        backward: dict[bool, tuple[float, float]] = {}  # by whether a layer is frozen
        for unit in reversed(spec.layers[spec.lowest_trained :]):
            if unit.frozen not in backward:
                plain, kept = (
                    rates.seconds(backward_products(spec, unit, base, kept=each))
                    + backward_nbytes(spec, unit, base, kept=each) / profile.gpu_copy
                    for each in (False, True)
                )
                backward[unit.frozen] = plain, kept
            plain, kept = backward[unit.frozen]
            again.append(plain)
            spared.append(plain - kept)
        self._spared = np.cumsum(spared)
        """Seconds that so many last layers spare on a micro-batch by what they keep."""
        products = (3 if base.vocab_chunks == 1 else 4) - spec.head.frozen
        head = rates.seconds(head_products(spec, base, spec.vocab, products))
        self._arithmetic = self._layers * one + sum(again) + head
        # The last layer's update is due before its forward, and the next gradient comes after the
        # loss; a resident output matrix has none that goes down. Deferred, `_exposed` counts what
        # forward does not hide.
        self._loss = self._micro * rates.seconds(head_products(spec, base, spec.vocab, 3))
        # Forward, backward, and a boundary's copies.
        self._tasks = 4 * self._layers * self._micro * TASK_SECONDS
        self._boundary = base.tokens * spec.hidden * base.compute.nbytes
        self._kept = self._micro * kept_nbytes(spec, base)

    def least(self) -> float:
        """What no point on the base goes below: the arithmetic where all that may be is kept."""
        none, all_kept = np.array(0), np.array(len(self._spared) - 1)
        return float(self._compute(Counts(none, all_kept, none, none, none)))

    def seconds(self, point: Counts, stored: Sizes) -> Seconds:
        """The bound of every point, given what is on NVMe."""
        work = np.broadcast_arrays(*self.work(point, stored).values())
        lanes = np.sort(work, axis=0)
        narrow = NARROW_LOSS if self._base.window < 3 else 0.0
        first, second = lanes[-1], lanes[-2]
        exposed = OVERLAP_LOSS * second * (second / first) ** OVERLAP_FADE
        bound: Seconds = (first + exposed) * (1 + narrow) + self._tasks
        return bound

    def work(self, point: Counts, stored: Sizes) -> dict[Lane, Seconds]:
        """Seconds of work of every lane, and of what it waits for whatever the order."""
        spec, profile, size = self._spec, self._profile, self._base.compute.nbytes
        streamed = spec.param_count - self._resident[point.resident]
        updated = self._trained - self._resident_trained[point.resident]
        backward = self._layers - np.maximum(point.resident - 1, spec.lowest_trained)
        again = np.maximum(0, backward - self._base.window) * self._layer
        waiting = self._offloaded(point) + point.spilled * self._kept
        idle = self._forward * np.where((point.resident > 0) & spec.tied, 4, 1) + self._loss
        idle = idle * (not self._base.deferred)
        return {
            Lane.COMPUTE: self._compute(point) + self._exposed(point),
            Lane.H2D: ((streamed + again) * size + waiting) / profile.h2d,
            Lane.D2H: (updated * size + waiting) / profile.d2h,
            Lane.CPU: np.where(updated > 0, updated / profile.update + idle, 0.0),
            Lane.NVME_READ: stored.read / profile.nvme_read,
            Lane.NVME_WRITE: stored.nbytes / profile.nvme_write,
        }

    def _compute(self, point: Counts) -> Seconds:
        """Seconds of work of the compute lane."""
        resident = self._resident_trained[point.resident]
        moved = update_nbytes(self._base) * resident + 6 * (self._trained - resident)
        arithmetic = self._arithmetic - self._spared[point.kept + point.spilled]
        work = np.maximum(arithmetic, self._layers * LAUNCH_SECONDS)
        seconds: Seconds = self._micro * work + moved / self._profile.gpu_copy
        return seconds

    def _offloaded(self, point: Counts) -> Ints:
        """Bytes of boundaries that go down and come up again."""
        return np.maximum(point.offloaded - self._spec.lowest_trained, 0) * self._boundary

    def _exposed(self, point: Counts) -> Seconds:
        """Seconds in which the compute lane waits whatever the order.

        Between the last backward and the next forward nothing hides what is due first; forward
        waits for spilled activations that go down, between boundaries, slower than it makes them,
        and deferred, for updates that it does not hide.
        """
        spec, base, profile = self._spec, self._base, self._profile
        forward = self._layers * self._forward
        down = (point.spilled * self._kept + self._offloaded(point)) / profile.d2h
        seconds: Seconds = np.where(point.spilled > 0, np.maximum(0.0, down - forward), 0.0)
        rest = self._trained - self._resident_trained[point.resident]
        if not spec.embed.frozen:
            used = (spec.vocab if base.deferred else min(base.tokens, spec.vocab)) * spec.hidden
            rows = used / profile.update + 2 * self._boundary / profile.host_copy
            seconds = seconds + (point.resident < 1) * rows
            rest = rest - (point.resident < 1) * used
        if not spec.layers[0].frozen:
            seconds = seconds + (point.resident < 2) * (self._layer / profile.update)
            rest = rest - (point.resident < 2) * self._layer
        if base.deferred:
            seconds = seconds + np.maximum(0.0, rest / profile.update - forward)
        return seconds
