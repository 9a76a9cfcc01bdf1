"""How fast the CPU updates parameters: our kernel against others, alone and beside copies.

All contenders share one allocation and one number of threads and run in interleaved rounds, since a
host's memory is not equally fast at all times.
"""

from __future__ import annotations

import importlib
import itertools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from slideformer.kernels.adamw import AdamW, Segment, adamw_update, stream_rmw
from slideformer.kernels.adamw8 import adamw8_update
from slideformer.kernels.adamw_library import kernel_build
from slideformer.kernels.quantise import block_count
from slideformer.memory.arena import HostArena

UPDATE_BYTES = 26
"""What an update moves per parameter: hi, lo, m and v in and out, and a BF16 gradient in."""

STREAM_BYTES = 24
"""What `stream_rmw` moves per element: three FP32 values in and out."""

_WAYS = ("h2d", "d2h")

COPY_PIECES = 8
"""Pieces of pinned memory that copies one way go round."""

_FASTEST_COPY = 150e9
"""Bytes/s that no bus exceeds, to start enough copies."""

_HYPER = AdamW(lr=1e-5, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, step=10)


class Copies:
    """Copies of ``nbytes`` between pinned host memory and the GPU, one way or both at once.

    Each takes the next of several pieces of host memory, since a step's copies do not find in the
    CPU's cache what the one before left there. On the CPU both ends are host memory and nothing
    overlaps.
    """

    def __init__(self, device: torch.device, nbytes: int) -> None:
        self.nbytes = nbytes
        self._cuda = device.type == "cuda"
        size = COPY_PIECES * nbytes
        self._host = [
            itertools.cycle(
                torch.zeros(size, dtype=torch.uint8, pin_memory=self._cuda).split(nbytes)
            )
            for _ in _WAYS
        ]
        self._far = [torch.zeros(nbytes, dtype=torch.uint8, device=device) for _ in _WAYS]
        self._streams = [torch.cuda.Stream(device) for _ in _WAYS] if self._cuda else [None, None]

    def queue(self, ways: tuple[str, ...], times: int) -> None:
        """Start ``times`` copies of all bytes each way, ``"h2d"`` or ``"d2h"``."""
        for _ in range(times):
            for way, stream in zip(_WAYS, self._streams, strict=True):
                if way in ways:
                    with torch.cuda.stream(stream):
                        self.copy(way)

    def copy(self, way: str) -> None:
        """Start one copy on the current stream."""
        side = _WAYS.index(way)
        source, target = next(self._host[side]), self._far[side]
        if way == "d2h":
            source, target = target, source
        target.copy_(source, non_blocking=True)

    def busy(self) -> bool:
        """Whether a copy is still to be done."""
        return any(stream is not None and not stream.query() for stream in self._streams)

    def wait(self) -> None:
        """Until all copies are done."""
        for stream in self._streams:
            if stream is not None:
                stream.synchronize()

    def rate(self, *ways: str) -> float:
        """Bytes per second of copies these ways, all together."""
        times = 8
        self.queue(ways, 1)
        self.wait()
        started = time.perf_counter()
        self.queue(ways, times)
        self.wait()
        return len(ways) * times * self.nbytes / (time.perf_counter() - started)


def update_rates(
    device: torch.device, numel: int, threads: int, rounds: int, copy_nbytes: int
) -> dict[str, Any]:
    """CPU AdamW against what else could update ``numel`` parameters, in interleaved rounds.

    The contenders share one allocation of huge pages and ``threads`` threads:

    - ``adamw``: ours, BF16 gradient in, BF16 weight out (the high half), 26 bytes a parameter;
    - ``adamw8``: the same with moments of 8 bits, 14 bytes a parameter;
    - ``stream``: a read-modify-write loop over three FP32 arrays, 24 bytes an element;
    - ``torch``: ``torch._fused_adamw_`` on FP32 weights and gradients;
    - ``torch_casts``: the same with the casts from the BF16 gradient and to the BF16 weight;
    - ``deepspeed``: DeepSpeed's CPU Adam on FP32 weights and gradients, where it is installed;
    - ``adamw_busy``: ours with copies running both ways, where there is a GPU.

    Returns the median seconds of each (``seconds``) and what follows from them.
    """
    previous = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        state = UpdateState(numel)
        contenders, problem = _contenders(state, threads)
        copies = Copies(device, copy_nbytes) if device.type == "cuda" else None
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(rounds):
            for name, update in contenders.items():
                state.refill()
                times[name].append(seconds_of(update))
            if copies is not None:
                state.refill()
                beside = _beside(copies, min(times["adamw"]), contenders["adamw"])
                if beside is not None:
                    times.setdefault("adamw_busy", []).append(beside)
    finally:
        torch.set_num_threads(previous)
    seconds = {name: statistics.median(each) for name, each in times.items()}
    both = zip(times["stream"], times["adamw"], strict=True)
    shares = [UPDATE_BYTES / adamw / (STREAM_BYTES / stream) for stream, adamw in both]
    return {
        "numel": numel,
        "threads": threads,
        "rounds": rounds,
        "build": kernel_build(),
        "seconds": seconds,
        "all_seconds": times,
        "params_per_second": {n: numel / s for n, s in seconds.items() if n != "stream"},
        "adamw_bytes_per_second": UPDATE_BYTES * numel / seconds["adamw"],
        "stream_bytes_per_second": STREAM_BYTES * numel / seconds["stream"],
        "share_of_stream": statistics.median(shares),
        "deepspeed": problem,
    }


def _contenders(
    state: UpdateState, threads: int
) -> tuple[dict[str, Callable[[], None]], str | None]:
    """The contenders by name, and why DeepSpeed is not among them, if it is not."""
    found: dict[str, Callable[[], None]] = {
        "adamw": lambda: state.adamw(threads),
        "adamw8": lambda: state.adamw8(threads),
        "stream": lambda: stream_rmw(*state.thirds, threads),
        "torch": state.torch,
        "torch_casts": state.torch_casts,
    }
    try:
        found["deepspeed"] = state.deepspeed()
    except ImportError:
        return found, "not installed"
    except Exception as error:  # its build at run time fails in many ways
        return found, f"{type(error).__name__}: {error}"
    return found, None


def hyper_parameters(numel: int) -> tuple[AdamW, list[Segment]]:
    """Settings of an update of ``numel`` parameters as in the middle of training."""
    return _HYPER, [Segment(0, numel, _HYPER.lr, _HYPER.weight_decay)]


class UpdateState:
    """Weights, moments and gradients in one allocation, as each contender wants them."""

    def __init__(self, numel: int) -> None:
        self.numel = numel
        self._arena = HostArena(24 * numel)
        arrays = self._arena.tensor.view(torch.float32).split(numel)
        master, self.m, self.v, self.p32, self.g32, halves = arrays
        self.thirds = master, self.m, self.v
        self.hi, self.lo = master.view(torch.int16).split(numel)
        self.out16, self.g16 = halves.view(torch.bfloat16).split(numel)
        block = torch.randn(min(numel, 1 << 20), generator=torch.Generator().manual_seed(0))
        self._block = block.repeat(-(-numel // block.numel()))[:numel].bfloat16()
        self.g16.copy_(self._block).mul_(1e-3)
        self.g32.copy_(self.g16)
        self._count = torch.tensor(9.0)

    def refill(self) -> None:
        """Values as training has them: denormal or infinite ones would cost time of their own."""
        self.hi.copy_(self._block.view(torch.int16))
        self.lo.zero_()
        self.p32.copy_(self._block)
        self.m.fill_(1e-4)
        self.v.fill_(1e-6)

    def adamw(self, threads: int) -> None:
        """Ours."""
        hyper, segments = hyper_parameters(self.numel)
        adamw_update(self.hi, self.lo, self.m, self.v, self.g16, segments, hyper, threads)

    def adamw8(self, threads: int) -> None:
        """Ours with 8-bit moments; codes lie where others have the first one, scales the second."""
        hyper, segments = hyper_parameters(self.numel)
        m, v, *_ = self.m.view(torch.uint8).split(self.numel)
        scales = self.v[: 2 * block_count(self.numel)]
        adamw8_update(self.hi, self.lo, m, v, scales, self.g16, segments, hyper, threads)

    def torch(self) -> None:
        """PyTorch's fused AdamW on FP32."""
        torch._fused_adamw_(
            [self.p32],
            [self.g32],
            [self.m],
            [self.v],
            [],
            [self._count],
            lr=_HYPER.lr,
            beta1=_HYPER.beta1,
            beta2=_HYPER.beta2,
            weight_decay=_HYPER.weight_decay,
            eps=_HYPER.eps,
            amsgrad=False,
            maximize=False,
        )

    def torch_casts(self) -> None:
        """The same between BF16 gradients and BF16 weights."""
        self.g32.copy_(self.g16)
        self.torch()
        self.out16.copy_(self.p32)

    def deepspeed(self) -> Callable[[], None]:
        """DeepSpeed's CPU Adam on the FP32 arrays; raises whatever its import or build raises."""
        adam = importlib.import_module("deepspeed.ops.adam")
        parameter = torch.nn.Parameter(self.p32)
        parameter.grad = self.g32
        optimizer = adam.DeepSpeedCPUAdam([parameter], lr=_HYPER.lr, adamw_mode=True)
        optimizer.step()  # makes its moments
        state = optimizer.state[parameter]
        state["exp_avg"], state["exp_avg_sq"] = self.m, self.v

        def update() -> None:
            optimizer.step()

        return update


def _beside(copies: Copies, seconds: float, update: Callable[[], None]) -> float | None:
    """Seconds of an update while copies run both ways; None if it outlasted them.

    ``seconds`` is what it takes alone, and decides how many copies are started.
    """
    copies.queue(("h2d", "d2h"), math.ceil(4 * seconds * _FASTEST_COPY / copies.nbytes))
    taken = seconds_of(update)
    lasted = copies.busy()
    copies.wait()
    return taken if lasted else None


def seconds_of(run: Callable[[], None], device: torch.device | None = None) -> float:
    """Wall-clock seconds of a call, what it starts on a GPU included."""
    cuda = device is not None and device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    run()
    if cuda:
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
