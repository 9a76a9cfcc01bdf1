"""Run a graph for real, on the CPU or on CUDA, with callables of your own.

    def double(task, reads, writes):
        writes[0].view(torch.float32).mul_(2)

    result = await sf.run(graph, {"double": double}, contents={"x": torch.ones(4)})
    result.contents["x"].view(torch.float32)

Every slot, and every buffer without one, gets a place in the arena of its tier before the first
task starts. There is no NVMe store here. The event loop that runs this decides what starts next, so
what else it does delays decisions.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from slideformer.config import format_size
from slideformer.devices import find_device, make_lanes
from slideformer.graph.buffers import Tier
from slideformer.graph.errors import (
    BudgetError,
    ConfigError,
    GraphError,
    TaskError,
    shown,
)
from slideformer.graph.graph import TaskGraph
from slideformer.graph.plan import Budgets
from slideformer.graph.tasks import Task
from slideformer.graph.verify import verify
from slideformer.memory.arena import Arenas
from slideformer.memory.layout import aligned, lay_out, places
from slideformer.memory.limits import available_host_memory
from slideformer.runtime.device import Binding, Device, Operation, Views, bind
from slideformer.runtime.policies import Policy, make_policy
from slideformer.runtime.runs import Event, Launch, TaskRun
from slideformer.runtime.scheduler import Scheduler
from slideformer.runtime.trace import Trace
from slideformer.simulation import GraphTimeline, check_instances

Callback = Callable[[Task, tuple[Tensor, ...], tuple[Tensor, ...]], object]
"""What carries out a task: called with the task and the memory of its ``reads`` and ``writes``.

The tensors are uint8 [nbytes] in the order of `Task.reads` and `Task.writes`; a buffer that is read
and written is in both. Called from a thread of the task's lane. On CUDA, tasks of the lanes
``compute``, ``h2d`` and ``d2h`` are called with their lane's stream as the current one, and should
launch their work and return.
"""


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a run leaves: when each task ran, and the carried buffers, uint8 [nbytes] on the CPU."""

    timeline: GraphTimeline
    contents: Mapping[str, Tensor]


async def run(
    graph: TaskGraph,
    bindings: Mapping[str, Callback],
    device: Literal["auto", "cpu", "cuda"] = "cpu",
    policy: Policy | str = "earliest-deadline",
    *,
    instances: int = 1,
    contents: Mapping[str, Tensor] | None = None,
    budgets: Budgets | None = None,
    timeout: float | None = None,  # noqa: ASYNC109 – bounds each task, not the run
) -> RunResult:
    """Run ``instances`` of ``graph`` one behind another; ``bindings`` maps each op to its callable.

    ``contents`` fills carried buffers beforehand; the others start as zeros. ``budgets`` defaults
    to the memory that is free. A callable that has not returned after ``timeout`` seconds fails the
    run; its thread cannot be stopped and is left behind, as is the memory it works on.

    Raises `ConfigError` for a number of instances, a timeout or a device that cannot be;
    `DeviceError` if there is no such device; `GraphError` for a graph that breaks a rule, an op
    without a callable, contents that do not fit and buffers on NVMe; `BudgetError` if not all
    places fit the budgets; `PolicyError`; and `TaskError` with the task's name if a callable raises
    or does not return.
    """
    check_instances(instances)
    _check_timeout(timeout)
    verify(graph)
    chosen = make_policy(policy) if isinstance(policy, str) else policy
    target = find_device(device)
    _check_places(graph, budgets or _free_memory(target), target)
    wanted = places([graph])
    arenas = Arenas(lay_out(wanted), wanted, target)
    watched: _WatchedDevice | None = None
    try:
        operations = bind(graph, {op: _binding(op, each) for op, each in bindings.items()}, arenas)
        _fill(graph, arenas, contents or {})
        arenas.ready()
        if target.type == "cuda":
            torch.cuda.synchronize(target)  # from here on every stream sees the contents
        watched = _WatchedDevice(make_lanes(target))
        trace = Trace(keep=instances)
        scheduler = Scheduler(watched, chosen, trace=trace)
        done = [scheduler.submit(graph, operations) for _ in range(instances)]
        await _finish(asyncio.gather(*done), watched, timeout)
        return RunResult(
            GraphTimeline(trace.timeline().spans, graph=graph),
            {b.name: arenas.view(b).cpu().clone() for b in graph.buffers.values() if b.carried},
        )
    except asyncio.CancelledError:
        if watched is not None:
            watched.abandon()
        raise
    finally:
        if watched is None:
            arenas.close()
        elif not watched.abandoned:
            watched.close()
            arenas.close()


def _check_timeout(timeout: float | None) -> None:
    if timeout is not None and not (isinstance(timeout, int | float) and timeout > 0):
        raise ConfigError(f"timeout is {timeout!r}; it must be seconds, more than 0, or None")


def _check_places(graph: TaskGraph, budgets: Budgets, device: torch.device) -> None:
    """Refuse a graph whose places are not all to be had at once.

    Nothing less is safe for every order that a policy may choose. On the CPU the ``gpu`` tier lies
    in host memory.
    """
    wanted = places([graph])
    first: dict[str, str] = {}
    for task in graph.tasks:
        for name in (*task.reads, *task.writes):
            first.setdefault(graph.buffers[name].place, f"task {task.name}: ")
    room = {"GPU": budgets.gpu or 0, "host": budgets.host}
    used = dict.fromkeys(room, 0)
    for place in (*first, *(name for name in wanted if name not in first)):
        tier, nbytes = wanted[place]
        if tier is Tier.NVME:
            raise GraphError(
                f"{first.get(place, '')}{place} is on NVMe, which run() has no store for; give it "
                "another tier, or train by such a graph with sf.Engine"
            )
        side = "GPU" if tier is Tier.GPU and device.type == "cuda" else "host"
        used[side] += aligned(nbytes)
        if used[side] > room[side]:
            raise BudgetError(
                f"{first.get(place, '')}{place} of {format_size(nbytes)} brings graph "
                f"{graph.name!r} to {format_size(used[side])} of {side} memory, the budget is "
                f"{format_size(room[side])}; let buffers share slots, or raise the budget"
            )


def _free_memory(device: torch.device) -> Budgets:
    gpu = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    return Budgets(gpu, available_host_memory())


def _binding(op: str, call: Callback) -> Binding:
    if not callable(call):
        raise GraphError(f"op {op!r} is bound to {shown(call)}, which cannot be called")
    if inspect.iscoroutinefunction(call):
        raise GraphError(f"op {op!r} is bound to a coroutine function; bind a plain one")

    def make(task: Task, views: Views) -> Operation:
        reads = tuple(views[name] for name in task.reads)
        writes = tuple(views[name] for name in task.writes)

        def operate(_: Any) -> None:
            # Tensors of its own: one that it reshapes in place is whole again in the next instance.
            answer = call(task, tuple(map(Tensor.detach, reads)), tuple(map(Tensor.detach, writes)))
            if inspect.iscoroutine(answer) or inspect.isgenerator(answer):
                answer.close()
                raise TaskError(
                    f"op {op!r} returned a {type(answer).__name__} instead of doing its work; "
                    "bind a plain function"
                )

        return operate

    return make


def _fill(graph: TaskGraph, arenas: Arenas, contents: Mapping[str, Tensor]) -> None:
    for buffer in graph.buffers.values():
        if buffer.carried and buffer.tier is Tier.GPU:  # host arenas are zero already
            arenas.view(buffer).zero_()
    for name, tensor in contents.items():
        known = graph.buffers.get(name)
        if not isinstance(tensor, Tensor):
            raise GraphError(f"contents for {name!r} are a {type(tensor).__name__}, not a tensor")
        if known is None or not known.carried:
            what = "is not a buffer" if known is None else "is not carried"
            raise GraphError(f"contents for {name!r}, which {what} of graph {graph.name!r}")
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
            raise GraphError(f"contents for {name!r} are no plain tensor with bytes to copy")
        flat = tensor.detach().resolve_conj().contiguous().reshape(-1).view(torch.uint8)
        if flat.numel() != known.nbytes:
            raise GraphError(
                f"contents for {name} have {flat.numel()} bytes, the buffer has {known.nbytes}"
            )
        arenas.view(known).copy_(flat)


async def _finish(
    done: asyncio.Future[list[None]], watched: _WatchedDevice, limit: float | None
) -> None:
    """Wait for a run; raises what failed it, or `TaskError` for the first overdue task."""
    while limit is not None:
        finished, _ = await asyncio.wait({done}, timeout=min(limit / 4, 1.0))
        if finished:
            break
        overdue = watched.overdue(limit)
        if overdue:
            watched.abandon()
            done.cancel()
            with suppress(asyncio.CancelledError):
                await done
            left = "; ".join(f"{run!r} in thread {thread}" for run, thread in overdue)
            raise TaskError(
                f"{overdue[0][0]!r} has not returned after {limit:g} s; left running: {left}"
            )
    await done


class _WatchedDevice:
    """A device that knows since when each callable has been running, and can be abandoned."""

    def __init__(self, inner: Device) -> None:
        self._inner = inner
        self.stream_lanes = inner.stream_lanes
        self.abandoned = False
        self._running: dict[TaskRun, tuple[float, str]] = {}

    def start(self, post: Callable[[Event], None]) -> None:
        self._post = post
        self._inner.start(self._report)

    def launch(self, launches: Sequence[tuple[Launch, Operation, Any]]) -> None:
        self._inner.launch(
            [
                (launch, partial(self._call, launch.run, operation), context)
                for launch, operation, context in launches
            ]
        )

    def close(self) -> None:
        self._inner.close()

    def abandon(self) -> None:
        """Let go of tasks that may never end; the threads end when their tasks do."""
        self.abandoned = True
        threading.Thread(
            target=self._inner.close, name="slideformer-abandoned", daemon=True
        ).start()

    def overdue(self, timeout: float) -> list[tuple[TaskRun, str]]:
        """Callables running for longer than ``timeout`` seconds, each with its thread's name."""
        limit = time.monotonic() - timeout
        running = sorted(self._running.copy().items(), key=lambda item: item[1][0])
        return [(run, thread) for run, (since, thread) in running if since < limit]

    def _call(self, run: TaskRun, operation: Operation, context: Any) -> None:
        self._running[run] = (time.monotonic(), threading.current_thread().name)
        try:
            operation(context)
        finally:
            del self._running[run]

    def _report(self, event: Event) -> None:
        if not self.abandoned:  # the loop may be gone by now
            self._post(event)
