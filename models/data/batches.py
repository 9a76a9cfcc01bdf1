"""Batches for training: pads rows, shifts targets, shuffles by (seed, epoch), resumes anywhere.

The batch of step ``k`` is a pure function of the data set, the batch size, the seed and ``k``. One
batch costs a few numpy gathers, so it can be drawn in a thread while a step runs. Tensors are plain
CPU tensors; pinning them and moving them is the caller's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from slideformer.graph.errors import ConfigError, DataError
from slideformer.models.data.dataset import TokenDataset

IGNORED_TARGET = -100  # the index that cross entropy in PyTorch ignores


@dataclass(frozen=True, eq=False)
class Batch:
    """What one step trains on.

    input_ids: int64 [B, S], padded on the right. targets: int64 [B, S]; ``targets[b, t]`` is the
    token at ``t + 1`` if it is learnt, else -100, and the last column is -100. real_tokens: tokens
    that are not padding. target_tokens: targets that are not -100. rows: rows that hold a record;
    the others, at the end of an epoch, are padding throughout.
    """

    input_ids: torch.Tensor
    targets: torch.Tensor
    real_tokens: int
    target_tokens: int
    rows: int

    def check(self, shape: tuple[int, int], vocab: int) -> None:
        """Raise `DataError` unless a step of ``shape`` for a vocabulary of that size can use it."""
        if tuple(self.input_ids.shape) != shape or tuple(self.targets.shape) != shape:
            raise DataError(
                f"the batch is {tuple(self.input_ids.shape)} with targets "
                f"{tuple(self.targets.shape)}; this engine was planned for {shape}"
            )
        if self.target_tokens == 0:
            raise DataError("the batch has no target token, so it has no loss; leave it out")
        if self.input_ids.dtype != torch.int64 or self.targets.dtype != torch.int64:
            raise DataError(
                f"the batch has ids of {self.input_ids.dtype} and targets of {self.targets.dtype}; "
                "both must be torch.int64"
            )
        learnt = self.targets[self.targets != IGNORED_TARGET]
        tokens = torch.cat([self.input_ids.reshape(-1), learnt])
        lowest, highest = int(tokens.min()), int(tokens.max())
        if lowest < 0 or highest >= vocab:
            raise DataError(
                f"the batch has token id {lowest if lowest < 0 else highest}, the model's are 0 to "
                f"{vocab - 1}; use the tokenizer that belongs to the model"
            )
        if len(learnt) != self.target_tokens:
            raise DataError(
                f"the batch says it has {self.target_tokens} targets, but {len(learnt)} are not "
                f"{IGNORED_TARGET}; count those"
            )


def make_batch(dataset: TokenDataset, rows: NDArray[np.int64], batch_size: int) -> Batch:
    """The batch of the given row numbers, int64 [n] with n ≤ ``batch_size``, in their order."""
    assert len(rows) <= batch_size
    starts = dataset.offsets[rows]
    lengths = dataset.offsets[rows + 1] - starts
    columns = np.arange(dataset.seq_len)
    real = columns < lengths[:, None]
    at = np.where(real, starts[:, None] + columns, 0)
    input_ids = np.full((batch_size, dataset.seq_len), dataset.pad_id, dtype=np.int64)
    targets = np.full((batch_size, dataset.seq_len), IGNORED_TARGET, dtype=np.int64)
    if dataset.tokens:
        input_ids[: len(rows)] = np.where(real, dataset.ids[at], dataset.pad_id)
        learnt = (real & dataset.labels[at])[:, 1:]
        targets[: len(rows), :-1] = np.where(learnt, input_ids[: len(rows), 1:], IGNORED_TARGET)
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        targets=torch.from_numpy(targets),
        real_tokens=int(lengths.sum()),
        target_tokens=int(np.count_nonzero(targets != IGNORED_TARGET)),
        rows=len(rows),
    )


class BatchStream(Iterator[Batch]):
    """Batches of a data set, shuffled anew each epoch, for ``epochs`` epochs or without end.

    Each epoch shows every row once; its last batch may be partly padding. Not thread-safe: one
    thread at a time may draw. Raises ConfigError for sizes below one or a negative seed, DataError
    for a data set without rows.
    """

    def __init__(
        self, dataset: TokenDataset, batch_size: int, seed: int, epochs: int | None = None
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"a batch size of {batch_size} is too small; use 1 or more")
        if seed < 0:
            raise ConfigError(f"the seed {seed} is negative; use 0 or more")
        if epochs is not None and epochs < 1:
            raise ConfigError(f"{epochs} epochs train on nothing; use 1 or more")
        if not len(dataset):
            raise DataError(f"{dataset.source}: holds no rows")
        self._dataset = dataset
        self._batch_size = batch_size
        self._seed = seed
        self._step = 0
        self._order: tuple[int, NDArray[np.int64]] = (-1, np.empty(0, dtype=np.int64))
        self.steps_per_epoch = -(-len(dataset) // batch_size)
        self.steps = None if epochs is None else epochs * self.steps_per_epoch

    def batch(self, step: int) -> Batch:
        """The batch of ``step``, counted from 0 over all epochs; the position stays as it is."""
        assert step >= 0
        epoch, index = divmod(step, self.steps_per_epoch)
        first = index * self._batch_size
        rows = self._epoch_order(epoch)[first : first + self._batch_size]
        return make_batch(self._dataset, rows, self._batch_size)

    def __next__(self) -> Batch:
        if self.steps is not None and self._step >= self.steps:
            raise StopIteration
        batch = self.batch(self._step)
        self._step += 1
        return batch

    def state_dict(self, step: int | None = None) -> dict[str, int]:
        """Where to continue: before ``step``, by default the next batch to be drawn.

        Whoever draws ahead of training names the first step that is not trained yet.
        """
        epoch, index = divmod(self._step if step is None else step, self.steps_per_epoch)
        return {"epoch": epoch, "index": index, **self._identity()}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continues at a position from :meth:`state_dict`.

        Raises DataError if the position is of another data set, batch size or seed, with which the
        run could not go on as it began.
        """
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise DataError(
                    f"{self._dataset.source}: the saved run had {name} {state.get(name)}, this one "
                    f"has {value}; resume with the data, batch size and seed it was started with"
                )
        self._step = state["epoch"] * self.steps_per_epoch + state["index"]

    def _identity(self) -> dict[str, int]:
        """What must be the same for the batches to be the same."""
        return {
            "rows": len(self._dataset),
            "tokens": self._dataset.tokens,
            "target_tokens": self._dataset.target_tokens,
            "seq_len": self._dataset.seq_len,
            "batch_size": self._batch_size,
            "seed": self._seed,
        }

    def _epoch_order(self, epoch: int) -> NDArray[np.int64]:
        cached, order = self._order
        if cached != epoch:
            # Raw bits of a bit generator are the same in every version of numpy; those of
            # Generator.permutation are not promised to be.
            bits = np.random.PCG64(np.random.SeedSequence([self._seed, epoch]))
            order = np.argsort(bits.random_raw(len(self._dataset)), kind="stable")
            self._order = (epoch, order)
        return order
