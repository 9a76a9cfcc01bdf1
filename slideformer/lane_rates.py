"""How fast the lanes beside computing are, alone and together: copies, CPU updates, hand-overs."""

from __future__ import annotations

import asyncio
import statistics
import threading
import time
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from slideformer.graph.buffers import Tier
from slideformer.graph.builder import GraphBuilder
from slideformer.graph.graph import TaskGraph
from slideformer.graph.tasks import Lane, Task, TaskKind
from slideformer.kernels.adamw_gpu import adamw_update_gpu
from slideformer.product_rates import layer_config
from slideformer.running import run
from slideformer.stand_in import Arithmetic, StandIn
from slideformer.update_rates import UPDATE_BYTES, Copies, UpdateState, hyper_parameters, seconds_of

_ROUNDS = 5
_BESIDE_SECONDS = 1.0
"""How long lanes are watched while others work."""

_CHAIN = 64
"""Tasks of a lane between which hand-overs are measured."""

_UPDATE_NUMEL = 1 << 20


@dataclass(frozen=True, slots=True)
class LaneRates:
    """Bytes/s of copies, parameters/s of CPU updates, and shares of both that are left together.

    The shares are those of `slideformer.graph.plan.Contention`; None where nothing runs beside.
    """

    h2d: float
    d2h: float
    update: float
    both_ways: float | None = None
    copies: float | None = None
    updates: float | None = None
    compute: float | None = None


def measure_lanes(
    device: torch.device, update_numel: int, copy_nbytes: int, threads: int
) -> LaneRates:
    """Copies of ``copy_nbytes``, and updates of ``update_numel`` parameters by some threads."""
    copies, state = Copies(device, copy_nbytes), UpdateState(update_numel)
    state.refill()
    state.adamw(threads)
    alone = update_numel / statistics.median(
        seconds_of(lambda: state.adamw(threads)) for _ in range(_ROUNDS)
    )
    h2d, d2h = copies.rate("h2d"), copies.rate("d2h")
    if device.type != "cuda":  # both ends are host memory and nothing overlaps
        return LaneRates(h2d, d2h, alone)
    both = copies.rate("h2d", "d2h", times=16)
    copies_beside, updates_beside = _copies_and_updates(copies, state, threads, both)
    return LaneRates(
        h2d,
        d2h,
        alone,
        both_ways=_share(both, h2d + d2h),
        copies=_share(copies_beside, both),
        updates=_share(updates_beside, alone),
        compute=_compute_beside(device, copies, both),
    )


def _share(part: float, whole: float) -> float:
    return min(1.0, part / whole)


def _copies_and_updates(
    copies: Copies, state: UpdateState, threads: int, both: float
) -> tuple[float, float]:
    """Bytes/s of copies both ways and parameters/s of updates while both go on."""
    stop, done = threading.Event(), 0

    def update() -> None:
        nonlocal done
        while not stop.is_set():
            state.adamw(threads)
            done += 1

    worker = threading.Thread(target=update)
    worker.start()
    try:
        before, started = done, time.perf_counter()
        rate = copies.rate("h2d", "d2h", times=_times(copies, both, _BESIDE_SECONDS))
        updated, seconds = done - before, time.perf_counter() - started
    finally:
        stop.set()
        worker.join()
    return rate, updated * state.numel / seconds


def _times(copies: Copies, both: float, seconds: float) -> int:
    """Copies each way that take about that long."""
    return max(2, round(seconds * both / (2 * copies.nbytes)))


def _compute_beside(device: torch.device, copies: Copies, both: float) -> float | None:
    """Share of its speed that a layer keeps beside copies both ways; None if it outlasted them."""
    stand_in = StandIn(layer_config(4096), Arithmetic(4, 1024, 4, 4096, "bf16"), device)
    stream = torch.cuda.current_stream(device)

    def forward() -> None:
        for _ in range(50):
            stand_in.forward()
        stream.synchronize()

    with torch.no_grad():
        forward()
        alone = seconds_of(forward)
        copies.queue(("h2d", "d2h"), _times(copies, both, 3 * alone))
        beside = seconds_of(forward)
        lasted = copies.busy()
        copies.wait()
    return _share(alone, beside) if lasted else None


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


def measure_handovers(device: torch.device, threads: int) -> dict[Lane, float]:
    """Mean seconds between consecutive tasks of the compute lane, and of the CPU lane.

    Measured in a run of the scheduler in which both always have a task ready: layers are launched,
    and updates of a million parameters done.
    """
    cuda = device.type == "cuda"
    tokens = 2048 if cuda else 64
    width = 2048 if cuda else 128
    stand_in = StandIn(layer_config(width), Arithmetic(1, tokens, 1, tokens, "bf16"), device)
    state = UpdateState(_UPDATE_NUMEL)
    state.refill()

    def forward(task: Task, reads: object, writes: object) -> None:
        with torch.no_grad():
            stand_in.forward()

    def update(task: Task, reads: object, writes: object) -> None:
        state.adamw(threads)

    with torch.no_grad():
        stand_in.forward()
    state.adamw(threads)
    result = asyncio.run(
        run(_chains(), {"forward": forward, "update": update}, "cuda" if cuda else "cpu", "fifo")
    )
    found = {}
    for lane in (Lane.COMPUTE, Lane.CPU):
        spans = result.timeline.of_lane(lane)[_CHAIN // 4 :]
        found[lane] = statistics.mean(
            max(0.0, after.started - before.stopped) for before, after in pairwise(spans)
        )
    return found


def _chains() -> TaskGraph:
    builder = GraphBuilder("handovers")
    chains = (
        ("forward", TaskKind.COMPUTE, Tier.GPU),
        ("update", TaskKind.CPU_UPDATE, Tier.CPU),
    )
    for op, kind, tier in chains:
        buffer = builder.buffer(op, 256, tier, carried=True)
        for number in range(_CHAIN):
            builder.task(f"{op}.n{number}", kind, op=op, reads=[buffer], writes=[buffer])
    return builder.build()
