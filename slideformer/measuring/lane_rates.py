"""How fast lanes are, alone and beside each other, in runs of the scheduler in which none waits.

What a lane does here is what it does in a step: layers are computed, pinned memory is copied both
ways, and the CPU updates chunk after chunk of a large part of the host's memory, since memory that
is far from a core is slower than what a small array shows.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from slideformer.graph.builder import GraphBuilder
from slideformer.graph.tasks import Lane, Task, TaskKind
from slideformer.kernels.adamw import adamw_update
from slideformer.kernels.adamw_gpu import adamw_update_gpu
from slideformer.measuring.product_rates import layer_config
from slideformer.measuring.stand_in import Arithmetic, StandIn
from slideformer.measuring.update_rates import UPDATE_BYTES, Copies, hyper_parameters, seconds_of
from slideformer.memory.arena import HostArena
from slideformer.running import run
from slideformer.runtime.trace import Span

WALKED_BYTES = 14
"""Host memory of a parameter that is updated: hi, lo, both moments and a BF16 gradient."""

_CHUNK = 32 << 20
"""Parameters of one update, as in a plan."""

_ROUNDS = 5
_MOST_TASKS = 1000


@dataclass(frozen=True, slots=True)
class LaneSizes:
    """Parameters in the memory that is walked over, bytes of a copy, a layer, seconds of a run."""

    update_numel: int
    copy_nbytes: int
    width: int
    tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class LaneRates:
    """Bytes/s of copies and parameters/s of CPU updates alone, and what is left beside others.

    ``launch`` and ``handover`` are seconds between tasks of the compute and of the CPU lane, and
    ``shares`` those of `MachineProfile.contention`.
    """

    h2d: float
    d2h: float
    update: float
    launch: float
    handover: float
    shares: Mapping[Lane, float]


def measure_lanes(device: torch.device, sizes: LaneSizes, threads: int) -> LaneRates:
    """Run computing alone, then with CPU updates, then all lanes, with ``threads`` for updates."""
    copies = Copies(device, sizes.copy_nbytes)
    arithmetic = Arithmetic(1, sizes.tokens, 1, sizes.tokens, "bf16")
    layer = StandIn(layer_config(sizes.width), arithmetic, device)
    walk = _Walk(sizes.update_numel, threads)
    h2d, d2h = copies.rate("h2d"), copies.rate("d2h")
    work = {
        Lane.COMPUTE: _Work(TaskKind.COMPUTE, 1.0, layer.forward),
        Lane.CPU: _Work(TaskKind.CPU_UPDATE, walk.chunk, walk.update),
        Lane.H2D: _Work(TaskKind.H2D, copies.nbytes, lambda: copies.copy("h2d")),
        Lane.D2H: _Work(TaskKind.D2H, copies.nbytes, lambda: copies.copy("d2h")),
    }
    with torch.no_grad():
        layer.forward()
        walk.update()  # builds the kernel where it has not been
        seconds = {
            Lane.COMPUTE: seconds_of(layer.forward, device),
            Lane.CPU: seconds_of(walk.update),
            Lane.H2D: copies.nbytes / h2d,
            Lane.D2H: copies.nbytes / d2h,
        }
    counts = {
        lane: max(4, min(_MOST_TASKS, round(sizes.seconds / each)))
        for lane, each in seconds.items()
    }

    def measured(*lanes: Lane) -> dict[Lane, _Measured]:
        return _together(device, {lane: (work[lane], counts[lane]) for lane in lanes})

    alone = measured(Lane.COMPUTE)
    updating = measured(Lane.COMPUTE, Lane.CPU)
    everything = measured(*work)
    rates = {
        Lane.COMPUTE: alone[Lane.COMPUTE].rate,
        Lane.CPU: updating[Lane.CPU].rate,
        Lane.H2D: h2d,
        Lane.D2H: d2h,
    }
    return LaneRates(
        h2d=h2d,
        d2h=d2h,
        update=rates[Lane.CPU],
        launch=alone[Lane.COMPUTE].gap,
        handover=everything[Lane.CPU].gap,
        shares={lane: min(1.0, everything[lane].rate / rate) for lane, rate in rates.items()},
    )


@dataclass(frozen=True, slots=True)
class _Work:
    """What a lane's tasks do: ``amount`` of it each."""

    kind: TaskKind
    amount: float
    do: Callable[[], object]


@dataclass(frozen=True, slots=True)
class _Measured:
    """Amount of work per second while at work, and median seconds between tasks."""

    rate: float
    gap: float


class _Walk:
    """Updates chunk after chunk of ``numel`` parameters, and starts anew at the end."""

    def __init__(self, numel: int, threads: int) -> None:
        self.chunk = min(numel, _CHUNK)
        self._chunks = numel // self.chunk
        self._next, self._threads = 0, threads
        numel = self._chunks * self.chunk
        self._arena = HostArena(WALKED_BYTES * numel)
        hi, lo, gradient, m, v = self._arena.tensor.split([2 * numel] * 3 + [4 * numel] * 2)
        self._state = (
            hi.view(torch.int16),
            lo.view(torch.int16),
            m.view(torch.float32),
            v.view(torch.float32),
            gradient.view(torch.bfloat16),
        )
        self._hyper, self._segments = hyper_parameters(self.chunk)

    def update(self) -> None:
        """The next chunk."""
        part = slice(self._next * self.chunk, (self._next + 1) * self.chunk)
        self._next = (self._next + 1) % self._chunks
        hi, lo, m, v, gradient = (each[part] for each in self._state)
        adamw_update(hi, lo, m, v, gradient, self._segments, self._hyper, self._threads)


def _together(
    device: torch.device, work: Mapping[Lane, tuple[_Work, int]]
) -> dict[Lane, _Measured]:
    """Tasks of these lanes, so many of each, in one run; measured while all lanes are at it."""
    builder = GraphBuilder("lanes")
    bindings: dict[str, Callable[[Task, object, object], None]] = {}
    for lane, (each, count) in work.items():
        bindings[lane] = _binding(each.do)
        for number in range(count):
            builder.task(f"{lane}.n{number}", each.kind, op=lane)
    kind: Literal["cuda", "cpu"] = "cuda" if device.type == "cuda" else "cpu"
    timeline = asyncio.run(run(builder.build(), bindings, kind, "fifo")).timeline
    spans = {lane: timeline.of_lane(lane) for lane in work}
    start = max(each[0].started for each in spans.values())
    stop = min(each[-1].stopped for each in spans.values())
    return {lane: _within(each, work[lane][0].amount, start, stop) for lane, each in spans.items()}


def _binding(do: Callable[[], object]) -> Callable[[Task, object, object], None]:
    def call(task: Task, reads: object, writes: object) -> None:
        with torch.no_grad():
            do()

    return call


def _within(spans: list[Span], amount: float, start: float, stop: float) -> _Measured:
    """Of the tasks that ran from ``start`` to ``stop``, or at least of the longest of them."""
    inside = [s for s in spans if s.started >= start and s.stopped <= stop]
    inside = inside or [max(spans, key=lambda s: s.seconds)]
    gaps = [max(0.0, after.started - before.stopped) for before, after in pairwise(inside)]
    return _Measured(
        amount * len(inside) / sum(s.seconds for s in inside),
        statistics.median(gaps) if gaps else 0.0,
    )


def host_copy_rate(nbytes: int) -> float:
    """Bytes/s, read and written, of a copy within host memory."""
    source, target = torch.ones(nbytes, dtype=torch.uint8), torch.zeros(nbytes, dtype=torch.uint8)

    def copy() -> None:
        target.copy_(source)

    copy()
    return 2 * nbytes / statistics.median(seconds_of(copy) for _ in range(_ROUNDS))


def gpu_copy_rate(device: torch.device, numel: int) -> float:
    """Bytes/s, read and written, of AdamW on ``numel`` parameters that are on the GPU."""

    def zeros(dtype: torch.dtype) -> Tensor:
        return torch.zeros(numel, dtype=dtype, device=device)

    half, full = torch.int16, torch.float32
    state = zeros(half), zeros(half), zeros(full), zeros(full), zeros(torch.bfloat16)
    norm = torch.ones(1, device=device)
    hyper, segments = hyper_parameters(numel)

    def update() -> None:
        adamw_update_gpu(*state, norm, segments, hyper)

    update()
    seconds = statistics.median(seconds_of(update, device) for _ in range(_ROUNDS))
    return UPDATE_BYTES * numel / seconds
