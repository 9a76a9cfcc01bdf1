"""Weights into the host's master arrays: from a Hugging Face model folder, or random.

A folder's safetensors files are streamed in pieces of bounded size straight into the split masters,
several pieces at once, so that no second copy of the model ever exists. Names, shapes and dtypes
are checked before the first value is read (``stored_weights.py``). Writing a model folder is the
matter of ``export.py``.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig

from slideformer.graph.model import ModelSpec, ParamSpec, UnitSpec
from slideformer.kernels.split import split_master
from slideformer.models.families import decoder_config
from slideformer.models.safetensors_file import DTYPES, StoredTensor, read_range
from slideformer.models.stored_weights import locate, stored_dtypes, untied
from slideformer.models.units import EMBED_KEY, MasterWeights

logger = logging.getLogger(__name__)

PIECE = 2 * 2**20
"""Elements of a parameter that are read, or drawn, at a time; random weights depend on it."""

_PIECE_BYTES = 4 * PIECE

Filled = Callable[[str], None]
"""Told the name of a unit whose masters are complete."""


def _nothing(unit: str) -> None:
    """Take no notice of a unit."""


def load_weights(
    folder: Path, spec: ModelSpec, weights: MasterWeights, filled: Filled = _nothing
) -> torch.dtype:
    """Fill the masters of all units from the safetensors files of a model folder.

    Padding between operands is zeroed. A tied model's output matrix may be stored as well, if it
    equals the token matrix; old checkpoints' rotary frequencies are ignored. ``filled`` is called
    with each unit's name when its masters are complete and before the next one's are touched, so
    that units may share memory.

    Returns:
        The dtype the weights are stored in; of several, the one with most elements.

    Raises:
        CheckpointError: a file is missing, cut short or damaged; a tensor is missing, unknown, or
            of a wrong shape or dtype. Values are not looked at.
    """
    sources, repeated_head = locate(folder, spec)
    if repeated_head is not None:
        _check_repeated(sources[EMBED_KEY], repeated_head)
    dtypes = stored_dtypes(sources, spec)
    if len(dtypes) > 1:
        names = " and ".join(str(each).removeprefix("torch.") for each in dtypes)
        logger.warning("%s holds weights in %s; it counts as %s", folder, names, dtypes[0])

    def read(param: ParamSpec, start: int, count: int, buffer: Tensor) -> Tensor:
        return _read(sources[param.key], start, count, buffer)

    _fill_masters(read, spec, weights, filled)
    return dtypes[0]


def stored_values(folder: Path, spec: ModelSpec, param: ParamSpec) -> Iterator[Tensor]:
    """The values of one parameter of a model folder, in the dtype they are stored in, by pieces.

    Each piece, 1-D, is valid until the next is asked for. Raises CheckpointError as `load_weights`
    does.
    """
    source = locate(folder, spec)[0][param.key]
    buffer = torch.empty(_PIECE_BYTES, dtype=torch.uint8)
    for start in range(0, param.numel, PIECE):
        yield _read(source, start, min(PIECE, param.numel - start), buffer)


def _read(source: StoredTensor, start: int, count: int, buffer: Tensor) -> Tensor:
    """Elements of a stored tensor, in ``buffer``."""
    stored_as = DTYPES[source.dtype]
    raw = buffer[: count * stored_as.itemsize]
    read_range(source, start * stored_as.itemsize, raw.numpy().data)
    return raw.view(stored_as)


def init_random(
    config: PretrainedConfig,
    spec: ModelSpec,
    weights: MasterWeights,
    seed: int,
    filled: Filled = _nothing,
) -> None:
    """Fill the masters of all units with random weights, as transformers initialises a new model.

    Matrices are normal with standard deviation ``initializer_range``, but for a zero row of the
    token matrix at ``pad_token_id``; biases are zero and norms one (centred ones zero). A
    parameter's values depend on ``seed`` and its name alone. ``filled`` is as for `load_weights`.
    """
    std = np.float32(config.initializer_range or 0.02)
    decoder = decoder_config(config)
    padding_idx, norm = decoder.padding_idx, 0.0 if decoder.centred else 1.0

    def draw(param: ParamSpec, start: int, count: int, buffer: Tensor) -> Tensor:
        values = buffer.view(torch.float32)[:count]
        if len(param.shape) == 1:
            return values.fill_(0.0 if param.key.endswith(".bias") else norm)
        array = values.numpy()
        named_generator(seed, f"{param.key}:{start}").standard_normal(dtype=np.float32, out=array)
        array *= std
        if param.key == EMBED_KEY and padding_idx is not None:
            row = padding_idx * param.shape[1] - start
            values[max(row, 0) : max(row + param.shape[1], 0)] = 0.0
        return values

    _fill_masters(draw, spec, weights, filled)


def named_generator(seed: int, name: str) -> np.random.Generator:
    """Random numbers that depend on ``seed`` and a name alone, not on what was drawn before."""
    digest = hashlib.blake2b(name.encode(), digest_size=16).digest()
    return np.random.Generator(np.random.SFC64([seed, int.from_bytes(digest, "little")]))


def _check_repeated(embed: StoredTensor, head: StoredTensor) -> None:
    """Raise unless a tied model's output matrix has the values of its token matrix."""
    for begin in range(0, embed.nbytes, _PIECE_BYTES):
        pieces = [bytearray(min(_PIECE_BYTES, embed.nbytes - begin)) for _ in range(2)]
        for tensor, piece in zip((embed, head), pieces, strict=True):
            read_range(tensor, begin, memoryview(piece))
        if pieces[0] != pieces[1]:
            raise untied(head)


def _fill_masters(
    produce: Callable[[ParamSpec, int, int, Tensor], Tensor],
    spec: ModelSpec,
    weights: MasterWeights,
    filled: Filled,
) -> None:
    """Split all parameters, unit by unit and piece by piece, into the masters; zero the padding.

    ``produce(param, start, count, buffer)`` returns the elements from ``start`` on, held in the
    ``uint8 [_PIECE_BYTES]`` buffer of the calling thread. Pieces run on one thread per core; the
    first error cancels those that have not begun.
    """
    local = threading.local()

    def work(param: ParamSpec, start: int, count: int, hi: Tensor, lo: Tensor) -> None:
        if not hasattr(local, "buffer"):
            local.buffer = torch.empty(_PIECE_BYTES, dtype=torch.uint8)
        values = produce(param, start, count, local.buffer)
        split_master(values.to(hi.device), hi, lo if len(lo) else torch.empty_like(hi))

    # One thread per operator in the workers: teams of threads that wait for each other at every
    # operator, in each of them, would be many times slower. The setting is also the default of
    # threads that begin later, so the caller's is put back.
    operator_threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(
        len(os.sched_getaffinity(0)),
        thread_name_prefix="weights",
        initializer=torch.set_num_threads,
        initargs=(1,),
    )
    try:
        for unit in spec.own_units:
            hi, lo = weights[unit.name]
            for future in [pool.submit(work, *piece) for piece in _pieces(unit, hi, lo)]:
                future.result()
            _zero_padding(unit, hi, lo)
            filled(unit.name)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(operator_threads)


def _pieces(
    unit: UnitSpec, hi: Tensor, lo: Tensor
) -> Iterator[tuple[ParamSpec, int, int, Tensor, Tensor]]:
    """A unit's parameters in pieces: parameter, first element, number of elements, both halves."""
    for array in (hi, lo):
        assert array.dtype is torch.int16
        assert array.shape == (unit.numel,) or (array is lo and unit.frozen and not len(lo))
    for param in unit.params:
        for start in range(0, param.numel, PIECE):
            count = min(PIECE, param.numel - start)
            where = slice(param.offset + start, param.offset + start + count)
            yield param, start, count, hi[where], lo[where]


def _zero_padding(unit: UnitSpec, hi: Tensor, lo: Tensor) -> None:
    """Zero what lies between and behind a unit's parameters."""
    for array in (hi, lo):
        end = 0
        for param in unit.params:
            array[end : param.offset].zero_()
            end = param.offset + param.numel
        array[end:].zero_()
