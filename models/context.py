"""What changes from step to step: the batch, the optimizer's settings, and where results go."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from slideformer.graph.errors import CheckpointError
from slideformer.graph.plan import MemoryPlan
from slideformer.kernels.adamw import AdamW
from slideformer.models.data.batches import Batch
from slideformer.models.documents import StepDocuments
from slideformer.models.export import HuggingFaceWriter


@dataclass(frozen=True)
class UsedRows:
    """Which rows of the embedding a step uses, and where.

    ``rows`` int64 [U] are the distinct token ids, ascending; the gradient of row u is the sum of
    the boundary gradients at the positions ``order[starts[u]:starts[u + 1]]``, in that order.
    ``idle`` int64 [V − U] are all other rows.
    """

    rows: Tensor
    starts: Tensor
    order: Tensor
    idle: Tensor

    @classmethod
    def of(cls, input_ids: Tensor, vocab: int, padding_idx: int | None) -> UsedRows:
        """Sort a step's token ids (int64 [T]); ``padding_idx`` gets no gradient from look-up."""
        order = torch.argsort(input_ids, stable=True)
        if padding_idx is not None:
            order = order[input_ids[order] != padding_idx]
        rows, counts = torch.unique_consecutive(input_ids[order], return_counts=True)
        starts = torch.zeros(len(rows) + 1, dtype=torch.int64)
        torch.cumsum(counts, 0, out=starts[1:])
        used = torch.zeros(vocab, dtype=torch.bool)
        used[rows] = True
        return cls(rows, starts, order, (~used).nonzero().view(-1))

    def packed(self, tokens: int) -> Tensor:
        """The same as one int64 [3·T + V + 3] of fixed layout, for the GPU; see `unpack_rows`."""
        vocab = len(self.rows) + len(self.idle)
        index = torch.zeros(3 * tokens + vocab + 3, dtype=torch.int64)
        packed = unpack_rows(index, tokens)
        packed.used_count.fill_(len(self.rows))
        packed.idle_count.fill_(len(self.idle))
        for target, source in (
            (packed.rows, self.rows),
            (packed.starts, self.starts),
            (packed.order, self.order),
            (packed.idle, self.idle),
        ):
            target[: len(source)] = source
        return index

    def within(self, start: int, stop: int) -> UsedRows:
        """The used and idle rows in ``[start, stop)``, counted from ``start``."""
        first, last = torch.searchsorted(self.rows, torch.tensor([start, stop])).tolist()
        idle = torch.searchsorted(self.idle, torch.tensor([start, stop])).tolist()
        starts = self.starts[first : last + 1]
        order = self.order[int(starts[0]) : int(starts[-1])]
        return UsedRows(
            self.rows[first:last] - start,
            starts - starts[0],
            order,
            self.idle[idle[0] : idle[1]] - start,
        )


class PackedRows(NamedTuple):
    """Views of a packed `UsedRows`; only the first ``used_count`` (``idle_count``) are valid."""

    used_count: Tensor
    idle_count: Tensor
    rows: Tensor
    starts: Tensor
    order: Tensor
    idle: Tensor


def unpack_rows(index: Tensor, tokens: int) -> PackedRows:
    """The parts of a packed `UsedRows` for steps of ``tokens`` tokens."""
    vocab = len(index) - 3 * tokens - 3
    return PackedRows(*index.split([1, 1, tokens, tokens + 1, tokens, vocab]))


@dataclass(frozen=True)
class StepResults:
    """Filled by tasks while a step runs.

    ``loss`` is the mean per target token, ``gradient_norm`` that of all gradients before clipping.
    ``decision``, of a deferred step, is how its updates work, or None if it is skipped.
    """

    loss: Future[float] = field(default_factory=Future)
    gradient_norm: Future[float] = field(default_factory=Future)
    decision: Future[AdamW | None] = field(default_factory=Future)

    def fail(self, error: BaseException) -> None:
        """Pass an error on to whoever waits for a result."""
        for future in (self.loss, self.gradient_norm):
            if not future.done():
                future.set_exception(error)


@dataclass(frozen=True)
class StepContext:
    """One step or evaluation: ``input_ids``, ``targets`` int64 [T] on the host, −100 = ignore.

    ``scale`` is one over the number of target tokens. ``used`` and ``optimizer`` are set for a
    training step, ``documents`` in a packed run.
    """

    input_ids: Tensor
    targets: Tensor
    scale: float
    results: StepResults
    used: UsedRows | None = None
    optimizer: AdamW | None = None
    documents: StepDocuments | None = None

    @classmethod
    def of(
        cls,
        batch: Batch,
        plan: MemoryPlan,
        results: StepResults,
        used: UsedRows | None = None,
        optimizer: AdamW | None = None,
    ) -> StepContext:
        """That of a batch, under a plan."""
        documents = StepDocuments.of(batch.documents(), plan.micro_batches) if plan.packed else None
        ids, targets = batch.input_ids.reshape(-1), batch.targets.reshape(-1)
        return cls(ids, targets, 1.0 / batch.target_tokens, results, used, optimizer, documents)

    def training(self) -> tuple[UsedRows, AdamW]:
        """What only a training step has."""
        assert self.used is not None
        assert self.optimizer is not None
        return self.used, self.optimizer

    def packed(self) -> StepDocuments:
        """What only a step of a packed run has."""
        assert self.documents is not None
        return self.documents


@dataclass(frozen=True)
class SaveContext:
    """One save: the writer that units are handed to, and what kept it from writing.

    A checkpoint that cannot be written harms no weights, so it does not fail the run.
    """

    writer: HuggingFaceWriter
    errors: list[CheckpointError] = field(default_factory=list)


class StateSink(Protocol):
    """Where a checkpoint's state goes."""

    def write(self, unit: str, begin: int, parts: Mapping[str, Tensor]) -> None:
        """Write elements of parts of `UnitState` from ``begin`` on; returns when it has them.

        The tensors are one-dimensional and in host memory. Raises `CheckpointError`.
        """


@dataclass(frozen=True)
class CheckpointContext:
    """One checkpoint: where state goes, and what kept it from going there."""

    sink: StateSink
    errors: list[CheckpointError] = field(default_factory=list)
