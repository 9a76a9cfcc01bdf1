"""What a plan is wanted for, and what a simulated step says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from slideformer.graph.graph import TaskGraph
from slideformer.graph.model import ModelSpec
from slideformer.graph.plan import Budgets, Compute, Optimizer
from slideformer.graph.profile import MachineProfile


@dataclass(frozen=True, slots=True)
class Prediction:
    """A simulated step: its duration, and when each of its tasks stops, in seconds.

    The duration is that of a step behind others, the stops are those of the first one.
    """

    seconds: float
    stops: Mapping[str, float]


@dataclass(frozen=True)
class PlanRequest:
    """What a plan is wanted for.

    ``workspace`` gives the bytes of GPU temporaries of (micro-batch rows, rows of a vocabulary
    chunk, tokens of a head tile). ``predict`` simulates so many steps, one behind another, on a
    machine under the policy that will run them. ``micro_rows``, ``vocab_chunks``, ``head_tile`` and
    ``window`` fix what is otherwise chosen; ``packed``, ``optimizer`` and ``deferred`` are those of
    the plan. ``resumed``: it is for a run that goes on, and keeps its batch. ``checkpoints``: there
    will be some regularly, so what is left of the host may hold a snapshot.
    """

    spec: ModelSpec
    rows: int
    seq_len: int
    compute: Compute
    budgets: Budgets
    profile: MachineProfile
    workspace: Callable[[int, int, int], int]
    predict: Callable[[TaskGraph, MachineProfile, int], Prediction]
    micro_rows: int | None = None
    vocab_chunks: int | None = None
    head_tile: int | None = None
    window: int | None = None
    packed: bool = False
    optimizer: Optimizer = Optimizer.ADAMW
    deferred: bool = False
    resumed: bool = False
    checkpoints: bool = False
