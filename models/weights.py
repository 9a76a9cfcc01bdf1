"""Weights into the host's master arrays: from a Hugging Face model folder, or random.

A folder's safetensors files are streamed in pieces of bounded size straight into the split masters,
several pieces at once, so that no second copy of the model ever exists. Names, shapes and dtypes
are checked against the spec before the first value is read, or by `check_weights` before there are
masters. Writing a model folder is the matter of ``export.py``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig

from slideformer.graph.errors import CheckpointError
from slideformer.graph.model import ModelSpec, ParamSpec, UnitSpec
from slideformer.kernels.split import split_master
from slideformer.models.families import decoder_config
from slideformer.models.safetensors_file import DTYPES, StoredTensor, read_header, read_range
from slideformer.models.units import EMBED_KEY, HEAD_KEY, MasterWeights

logger = logging.getLogger(__name__)

PIECE = 2 * 2**20
"""Elements of a parameter that are read, or drawn, at a time; random weights depend on it."""

_PIECE_BYTES = 4 * PIECE

Filled = Callable[[str], None]
"""Told the name of a unit whose masters are complete."""

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


def _nothing(unit: str) -> None:
    """Take no notice of a unit."""


def check_weights(folder: Path, spec: ModelSpec) -> torch.dtype:
    """Check that the safetensors files of a model folder fit the model; reads their headers alone.

    Returns:
        The dtype the weights are stored in; of several, the one with most elements.

    Raises:
        CheckpointError: as `load_weights` does, but for what only the values show: a tied model's
            output matrix that differs from the token matrix.
    """
    sources, _ = _locate(folder, spec)
    return _stored_dtypes(sources, spec)[0]


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
    sources, repeated_head = _locate(folder, spec)
    if repeated_head is not None:
        _check_repeated(sources[EMBED_KEY], repeated_head)
    dtypes = _stored_dtypes(sources, spec)
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
    source = _locate(folder, spec)[0][param.key]
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


def _locate(folder: Path, spec: ModelSpec) -> tuple[dict[str, StoredTensor], StoredTensor | None]:
    """The stored tensor of every parameter, and a tied model's output matrix if it is stored too.

    Raises CheckpointError for all that headers can tell.
    """
    stored = _find_tensors(folder)
    repeated_head = _take_tied_head(stored) if spec.tied else None
    return _match(folder, spec, stored), repeated_head


def _stored_dtypes(sources: dict[str, StoredTensor], spec: ModelSpec) -> list[torch.dtype]:
    """The dtypes the parameters are stored in, that with most elements first."""
    sizes: Counter[torch.dtype] = Counter()
    for unit in spec.own_units:
        for param in unit.params:
            sizes[DTYPES[sources[param.key].dtype]] += param.numel
    return [dtype for dtype, _ in sizes.most_common()]


def _find_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a model folder by name: of its single file, or of the shards of its index."""
    if (folder / _SINGLE).is_file():
        return read_header(folder / _SINGLE)
    index = folder / _INDEX
    if not index.is_file():
        if any(folder.glob("*.bin")):
            raise CheckpointError(
                f"{folder} holds its weights in *.bin files, which can run code when opened:"
                " convert them with AutoModelForCausalLM.from_pretrained(…).save_pretrained(…) of"
                " transformers, which writes safetensors"
            )
        raise CheckpointError(
            f"{folder} holds neither {_SINGLE} nor {_INDEX}: was the download complete?"
        )
    try:
        shard_of: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(shard_of.values()))
        lacking = [shard for shard in shards if not (folder / shard).is_file()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is damaged ({error!r}): download it again") from error
    if lacking:
        raise CheckpointError(
            f"{folder} lacks {len(lacking)} of the {len(shards)} shards that {_INDEX} lists, first"
            f" {lacking[0]}: download it again"
        )
    headers = {shard: read_header(folder / shard) for shard in shards}
    for key, shard in shard_of.items():
        if key not in headers[shard]:
            raise CheckpointError(
                f"{folder / shard} lacks tensor {key}, which {_INDEX} places there: download both"
                " again"
            )
    return {key: headers[shard][key] for key, shard in shard_of.items()}


def _take_tied_head(stored: dict[str, StoredTensor]) -> StoredTensor | None:
    """Take a tied model's output matrix out of ``stored``; alone, it becomes the token matrix.

    Returned, if it is stored beside a token matrix of the same shape and dtype.
    """
    head = stored.pop(HEAD_KEY, None)
    if head is None:
        return None
    embed = stored.setdefault(EMBED_KEY, head)
    if embed is head:
        return None
    if (embed.dtype, embed.shape) != (head.dtype, head.shape):
        raise _untied(head)
    return head


def _check_repeated(embed: StoredTensor, head: StoredTensor) -> None:
    """Raise unless a tied model's output matrix has the values of its token matrix."""
    for begin in range(0, embed.nbytes, _PIECE_BYTES):
        pieces = [bytearray(min(_PIECE_BYTES, embed.nbytes - begin)) for _ in range(2)]
        for tensor, piece in zip((embed, head), pieces, strict=True):
            read_range(tensor, begin, memoryview(piece))
        if pieces[0] != pieces[1]:
            raise _untied(head)


def _untied(head: StoredTensor) -> CheckpointError:
    return CheckpointError(
        f"{head.path}: {HEAD_KEY} differs from {EMBED_KEY}, but config.json ties them: set"
        " tie_word_embeddings to false there to train both"
    )


def _match(
    folder: Path, spec: ModelSpec, stored: dict[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """The stored tensor of every parameter; raises unless names, shapes and dtypes fit."""
    params = {param.key: param for unit in spec.own_units for param in unit.params}
    missing = [key for key in params if key not in stored]
    unknown = [
        key for key in stored if key not in params and not key.endswith("rotary_emb.inv_freq")
    ]
    problems = [
        f"{len(keys)} tensor{'s' * (len(keys) > 1)} {what}, first {keys[0]}"
        for keys, what in ((missing, "missing"), (unknown, "not part of the model"))
        if keys
    ]
    if problems:
        raise CheckpointError(
            f"the weights in {folder} do not fit its config.json ({spec.family}): "
            f"{'; '.join(problems)}. Are both of the same model, fully downloaded?"
        )
    for key, param in params.items():
        tensor = stored[key]
        if tensor.shape != param.shape:
            raise CheckpointError(
                f"{tensor.path}: tensor {key} has shape {list(tensor.shape)}, config.json asks for"
                f" {list(param.shape)}"
            )
        if tensor.dtype not in DTYPES:
            raise CheckpointError(
                f"{tensor.path}: tensor {key} is stored as {tensor.dtype}, supported are"
                f" {', '.join(DTYPES)}: use a checkpoint that is not quantized"
            )
    return {key: stored[key] for key in params}


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
