"""Batches for training: fills rows, shifts targets, shuffles by (seed, epoch), resumes anywhere.

A row holds one document, or as many as fit. The batch of step ``k`` is a pure function of the data
set, the packing, the batch size, the seed and ``k``. One batch costs a few numpy gathers, so it can
be drawn in a thread while a step runs. Tensors are plain CPU tensors; pinning them and moving them
is the caller's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from slideformer.graph.errors import ConfigError, DataError
from slideformer.kernels.reference import IGNORE_INDEX
from slideformer.models.data.dataset import TokenDataset
from slideformer.models.data.order import epoch_rows, shuffled
from slideformer.models.data.packing import Rows, joined, one_each, pack, padding_share
from slideformer.models.data.parts import counted


@dataclass(frozen=True, eq=False)
class Batch:
    """What one step trains on.

    input_ids: int64 [B, S], padded on the right. targets: int64 [B, S]; ``targets[b, t]`` is the
    token at ``t + 1`` if it is learnt, else -100, and the last column is -100. real_tokens: tokens
    that are not padding. target_tokens: targets that are not -100. rows: rows that hold a record;
    the others, at the end of an epoch, are padding throughout. positions: int64 [B, S], each
    token's position in its document, for rows of several documents; a row starts with a 0, and so
    does what pads it.
    """

    input_ids: torch.Tensor
    targets: torch.Tensor
    real_tokens: int
    target_tokens: int
    rows: int
    positions: torch.Tensor | None = None

    def check(self, shape: tuple[int, int], vocab: int, *, packed: bool) -> None:
        """Raise `DataError` unless a step of ``shape`` for a vocabulary of that size can use it.

        ``packed``: whether the step can tell several documents of a row apart.
        """
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
        learnt = self.targets[self.targets != IGNORE_INDEX]
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
                f"{IGNORE_INDEX}; count those"
            )
        if self.positions is not None:
            self._check_positions(shape, packed)

    def _check_positions(self, shape: tuple[int, int], packed: bool) -> None:
        assert self.positions is not None
        if not packed:
            raise DataError(
                "the batch has positions, so its rows may hold several documents; this engine was "
                "planned for one a row: set packing to true"
            )
        positions, dtype = self.positions, self.positions.dtype
        if tuple(positions.shape) != shape or dtype != torch.int64:
            raise DataError(
                f"the batch has positions of {tuple(positions.shape)}, {dtype}; they must be "
                f"{shape}, torch.int64"
            )
        starts = positions == 0
        if not (starts[:, 0].all() and (starts[:, 1:] | (positions.diff(dim=1) == 1)).all()):
            raise DataError(
                "the batch has positions that do not count up from 0 in each document; start every "
                "row and every document with 0"
            )

    def documents(self) -> torch.Tensor:
        """The positions, int64 [B, S]; without any, a row is one document."""
        if self.positions is not None:
            return self.positions
        return torch.arange(self.input_ids.shape[1]).expand_as(self.input_ids)


def make_batch(dataset: TokenDataset, rows: Rows, batch_size: int, *, packed: bool) -> Batch:
    """The batch of up to ``batch_size`` rows of documents; ``packed``: with positions."""
    assert len(rows) <= batch_size
    shape = (batch_size, dataset.seq_len)
    lengths = dataset.lengths[rows.documents]
    ends = np.concatenate(([0], np.cumsum(lengths)))  # of documents, in the batch's tokens
    filled = np.diff(ends[rows.starts])
    ids, learnt = dataset.read(rows.documents)
    # Of each token: its position in its document, and its place in the batch.
    position = counted(lengths)
    row = np.repeat(np.arange(len(rows)), filled)
    target = row * dataset.seq_len + counted(filled)

    input_ids = np.full(shape, dataset.pad_id, dtype=np.int64)
    targets = np.full(shape, IGNORE_INDEX, dtype=np.int64)
    input_ids.reshape(-1)[target] = ids
    targets.reshape(-1)[target[learnt] - 1] = ids[learnt]
    positions = None
    if packed:
        padding = np.zeros((batch_size, 1), dtype=np.int64)
        padding[: len(rows), 0] = filled
        columns = np.arange(dataset.seq_len)
        positions = torch.from_numpy(columns - np.where(columns < padding, 0, padding))
        positions.view(-1)[torch.from_numpy(target)] = torch.from_numpy(position)
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        targets=torch.from_numpy(targets),
        real_tokens=len(target),
        target_tokens=int(np.count_nonzero(learnt)),
        rows=len(rows),
        positions=positions,
    )


class BatchStream(Iterator[Batch]):
    """Batches of a data set, shuffled anew each epoch, for ``epochs`` epochs or without end.

    Each epoch shows every document as often as its source's weight says, by default once; its last
    batch may be partly padding. With ``packing`` the documents of a row are of one source and the
    same in every epoch, and the order of rows changes. Not thread-safe: one thread at a time may
    draw. Raises ConfigError for sizes below one or a negative seed, DataError for a data set
    without rows.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        batch_size: int,
        seed: int,
        epochs: int | None = None,
        *,
        packing: bool = False,
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
        self._packing = packing
        rows = [
            pack(part.lengths, dataset.seq_len) if packing else one_each(len(part))
            for part in dataset.parts
        ]
        self._rows = joined(rows, dataset.bounds[:-1])
        self._bounds = np.cumsum([0, *map(len, rows)])  # of the rows of each part
        self.steps_per_epoch = -(-len(self._epoch_order(0)) // batch_size)
        self.steps = None if epochs is None else epochs * self.steps_per_epoch

    @property
    def padding_share(self) -> float:
        """The share of padding in the batches of an epoch, on average over epochs."""
        tokens = sum(part.weight * float(part.lengths.sum()) for part in self._dataset.parts)
        return padding_share(tokens, self.steps_per_epoch * self._batch_size, self._dataset.seq_len)

    def batch(self, step: int) -> Batch:
        """The batch of ``step``, counted from 0 over all epochs; the position stays as it is."""
        assert step >= 0
        epoch, index = divmod(step, self.steps_per_epoch)
        first = index * self._batch_size
        order = self._epoch_order(epoch)[first : first + self._batch_size]
        rows = self._rows.take(order)
        return make_batch(self._dataset, rows, self._batch_size, packed=self._packing)

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
            "packing": int(self._packing),
            "contents": self._dataset.digest,
        }

    def _epoch_order(self, epoch: int) -> NDArray[np.int64]:
        cached, order = self._order
        if cached != epoch:
            taken = [
                begin + epoch_rows(int(end - begin), part.weight, self._seed, number, epoch)
                for number, (part, (begin, end)) in enumerate(
                    zip(self._dataset.parts, pairwise(self._bounds), strict=True)
                )
            ]
            shown = np.concatenate(taken)
            order = shown[shuffled(len(shown), self._seed, epoch)]
            self._order = (epoch, order)
        return order
