"""Machine profiles: how fast a machine does each kind of work, and what memory it takes."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from slideformer.graph.errors import ConfigError
from slideformer.graph.rates import ProductRates, RatePoint
from slideformer.graph.tasks import HOST_LANES, LONGEST, Lane, Task, TaskKind

RIVALS: Mapping[Lane, frozenset[Lane]] = {
    Lane.COMPUTE: frozenset({Lane.H2D, Lane.D2H, Lane.CPU}),
    Lane.H2D: frozenset({Lane.D2H, Lane.CPU}),
    Lane.D2H: frozenset({Lane.H2D, Lane.CPU}),
    Lane.CPU: frozenset({Lane.H2D, Lane.D2H}),
    Lane.NVME_READ: frozenset({Lane.NVME_WRITE}),
    Lane.NVME_WRITE: frozenset({Lane.NVME_READ}),
}
"""The lanes that slow a lane down: they use the same bus, memory or disk, or the launching core."""


_RATES = ("h2d", "d2h", "flops", "update", "host_copy", "gpu_copy", "nvme_read", "nvme_write")


@dataclass(frozen=True)
class MachineProfile:
    """How fast a machine does each kind of work; turns a task's cost into seconds.

    Rates are bytes/s, FLOP/s and parameters/s; ``gpu_copy`` counts bytes read and written.
    ``launch`` is the least that a task takes, in seconds, and ``handover`` what lies between two
    tasks of a host lane. ``points`` are measured rates of products; ``contention`` is the share of
    its rate that a lane keeps while all its `RIVALS` work. ``gpu_overhead`` and ``host_overhead``
    are bytes beside everything planned: CUDA context with its modules (0.77 to 0.82 GiB on an H100)
    and library workspaces, and the interpreter with its libraries. ``direct_storage`` says that the
    GPU and NVMe exchange bytes by themselves (GPUDirect Storage). ``widths`` are those of host
    lanes that run several tasks at once. Raises `ConfigError` for a value by which time would stand
    still or run backward.
    """

    name: str = "generic"
    h2d: float = 50e9
    d2h: float = 50e9
    flops: float = 640e12
    update: float = 3.2e9
    host_copy: float = 40e9
    gpu_copy: float = 2e12
    nvme_read: float = 1.2e9
    nvme_write: float = 1.8e9
    launch: float = 20e-6
    handover: float = 250e-6
    points: tuple[RatePoint, ...] = ()
    contention: Mapping[Lane, float] = field(default_factory=dict)
    gpu_overhead: int = 960 << 20
    host_overhead: int = 2 << 30
    direct_storage: bool = False
    widths: Mapping[Lane, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in _RATES:
            rate = getattr(self, name)
            self._require(name, rate, "above 0", rate > 0)
        for name in ("launch", "handover"):
            seconds = getattr(self, name)
            self._require(name, seconds, f"from 0 to {LONGEST:g} seconds", 0 <= seconds <= LONGEST)
        for lane, share in self.contention.items():
            self._require(f"contention of {lane}", share, "above 0 and at most 1", 0 < share <= 1)
        for lane, width in self.widths.items():
            self._require(f"width of {lane}", width, "at least 1", width >= 1)

    def _require(self, what: str, value: float, wanted: str, kept: bool) -> None:
        if not kept:
            raise ConfigError(f"machine {self.name!r}: {what} is {value}; it must be {wanted}")

    def seconds(self, task: Task) -> float:
        """Predicted duration of ``task`` while nothing else runs."""
        cost = task.cost
        if cost.seconds is not None:
            return cost.seconds
        work = cost.flops / self.flops
        if cost.products:
            work += self.products.seconds(cost.products)
        work += cost.nbytes / self._byte_rates[task.kind] + cost.params / self.update
        return self.launch + work + (self.handover if task.lane in HOST_LANES else 0.0)

    def speed(self, lane: Lane, busy: Collection[Lane]) -> float:
        """The share of its rates that a lane keeps while the lanes ``busy`` work.

        Of the loss beside all its rivals, each rival takes as large a factor.
        """
        rivals, share = RIVALS[lane], self.contention.get(lane, 1.0)
        return math.pow(share, len(rivals.intersection(busy)) / len(rivals))

    @cached_property
    def shared(self) -> MachineProfile:
        """This machine as a step finds it on average: every lane beside half of its rivals."""
        left = {lane: math.sqrt(self.contention.get(lane, 1.0)) for lane in Lane}
        compute = left[Lane.COMPUTE]
        return replace(
            self,
            h2d=self.h2d * left[Lane.H2D],
            d2h=self.d2h * left[Lane.D2H],
            flops=self.flops * compute,
            update=self.update * left[Lane.CPU],
            gpu_copy=self.gpu_copy * compute,
            nvme_read=self.nvme_read * left[Lane.NVME_READ],
            nvme_write=self.nvme_write * left[Lane.NVME_WRITE],
            points=tuple(replace(point, rate=point.rate * compute) for point in self.points),
            contention={},
        )

    @cached_property
    def products(self) -> ProductRates:
        """FLOP/s of products by kind and size."""
        return ProductRates(self.flops, self.points)

    @cached_property
    def _byte_rates(self) -> Mapping[TaskKind, float]:
        return {
            TaskKind.H2D: self.h2d,
            TaskKind.D2H: self.d2h,
            TaskKind.COMPUTE: self.gpu_copy,
            TaskKind.CPU_UPDATE: self.host_copy,
            TaskKind.CPU: self.host_copy,
            TaskKind.NVME_READ: self.nvme_read,
            TaskKind.NVME_WRITE: self.nvme_write,
            TaskKind.SAVE: self.nvme_write,
        }
