"""Tasks: the units of work of a graph, their kinds, the lanes they run on and their names.

Buffers are in ``buffers.py``; dependencies between tasks are derived in ``hazards.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from slideformer.graph.errors import GraphError


class Lane(StrEnum):
    """A queue of tasks on one resource."""

    COMPUTE = "compute"
    H2D = "h2d"
    D2H = "d2h"
    CPU = "cpu"
    NVME_READ = "nvme_read"
    NVME_WRITE = "nvme_write"


STREAM_LANES = frozenset({Lane.COMPUTE, Lane.H2D, Lane.D2H})
"""Lanes that are streams of their own on a GPU; copies have one each way, as PCIe has."""

HOST_LANES = frozenset(Lane) - STREAM_LANES
"""Lanes whose tasks threads of the host carry out."""


class TaskKind(StrEnum):
    """What a task does; the kind decides the lane."""

    H2D = "H2D"
    D2H = "D2H"
    COMPUTE = "COMPUTE"
    CPU_UPDATE = "CPU_UPDATE"
    CPU = "CPU"
    NVME_READ = "NVME_READ"
    NVME_WRITE = "NVME_WRITE"
    SAVE = "SAVE"


LANE_OF: Mapping[TaskKind, Lane] = {
    TaskKind.H2D: Lane.H2D,
    TaskKind.D2H: Lane.D2H,
    TaskKind.COMPUTE: Lane.COMPUTE,
    TaskKind.CPU_UPDATE: Lane.CPU,
    TaskKind.CPU: Lane.CPU,
    TaskKind.NVME_READ: Lane.NVME_READ,
    TaskKind.NVME_WRITE: Lane.NVME_WRITE,
    TaskKind.SAVE: Lane.NVME_WRITE,
}

_PARTS = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)+")


class TaskName(NamedTuple):
    """A task's name in parts: ``h2d.L07.fwd.c1`` is verb ``h2d`` on ``L07``, for ``fwd``, ``c1``.

    Plans, traces, errors and golden files share this spelling; ``parse`` inverts ``str``.
    """

    verb: str
    subject: str
    qualifiers: tuple[str, ...] = ()

    def __str__(self) -> str:
        return ".".join((self.verb, self.subject, *self.qualifiers))

    @classmethod
    def parse(cls, text: str) -> TaskName:
        """Split a name; raises `GraphError` if a part is missing or has a foreign character."""
        if not _PARTS.fullmatch(text):
            raise GraphError(
                f"task name {text!r} is malformed: expected verb.subject[.qualifier…] "
                "of letters, digits, '_' and '-', as in fwd.L07.m0"
            )
        verb, subject, *qualifiers = text.split(".")
        return cls(verb, subject, tuple(qualifiers))


class ProductKind(StrEnum):
    """Sorts of matrix products, by what else is done around them.

    ``FORWARD``: a layer's activations times its weights, with norms, rotation and activation.
    ``GRADIENT``: the two products that each of those has in backward; ``SUMMED``: the same where
    the weights' gradients are summed in FP32. ``ATTENTION``: scores and their product with the
    values. ``HEAD``: those of the output matrix, with the loss.
    """

    FORWARD = "forward"
    GRADIENT = "gradient"
    SUMMED = "summed"
    ATTENTION = "attention"
    HEAD = "head"


@dataclass(frozen=True, slots=True)
class Product:
    """Matrix products of one kind: their FLOPs, and the size that decides how fast they are.

    ``tokens`` go through each at once; for attention, those of a row. ``width`` is the layer's
    hidden size; for attention, a head's.
    """

    kind: ProductKind
    flops: int
    tokens: int
    width: int


LONGEST = 1e20
"""Most seconds that a task may be said to take, so that sums of them stay finite."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What a task costs, from which a machine profile computes its duration.

    ``nbytes`` are moved or touched bytes, ``params`` elements updated by the optimizer. ``flops``
    are floating-point operations at the machine's sustained rate, and ``products`` those at the
    rate of their kind and size. ``seconds``, if given, is a measured duration and overrides all;
    it is at most `LONGEST`.
    """

    nbytes: int = 0
    flops: int = 0
    params: int = 0
    products: tuple[Product, ...] = ()
    seconds: float | None = None

    @property
    def total_flops(self) -> int:
        """All floating-point operations."""
        return self.flops + sum(product.flops for product in self.products)


@dataclass(frozen=True, slots=True)
class Task:
    """One unit of work on one lane.

    ``op`` names the callable that does it, ``args`` are constants for that callable. ``after``
    names tasks that must finish first although no buffer says so.
    """

    name: str
    kind: TaskKind
    op: str
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    cost: Cost = Cost()
    args: Mapping[str, int | str] = field(default_factory=dict)
    lane: Lane = field(init=False, repr=False, compare=False)
    """That of its kind; looked at so often that it is kept."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "lane", LANE_OF[self.kind])
