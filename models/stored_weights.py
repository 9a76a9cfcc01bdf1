"""Which tensor of a model folder is which parameter, as the headers of its safetensors files tell.

Names, shapes and dtypes are checked against the spec; no value is read.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import torch

from slideformer.graph.errors import CheckpointError
from slideformer.graph.model import ModelSpec
from slideformer.models.safetensors_file import DTYPES, StoredTensor, read_header
from slideformer.models.units import EMBED_KEY, HEAD_KEY

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_SAMPLE = 4096


def check_weights(folder: Path, spec: ModelSpec) -> torch.dtype:
    """Check that the safetensors files of a model folder fit the model; reads their headers alone.

    Returns:
        The dtype the weights are stored in; of several, the one with most elements.

    Raises:
        CheckpointError: as `load_weights` does, but for what only the values show: a tied model's
            output matrix that differs from the token matrix.
    """
    sources, _ = locate(folder, spec)
    return stored_dtypes(sources, spec)[0]


def weights_digest(folder: Path, spec: ModelSpec) -> str:
    """SHA-256, in hexadecimal, by which the weights of a model folder are known again.

    Of each tensor's name, dtype and shape, and of `_SAMPLE` bytes in its midst. Raises
    `CheckpointError` as `check_weights` does.
    """
    found = hashlib.sha256()
    for key, stored in sorted(locate(folder, spec)[0].items()):
        found.update(repr((key, stored.dtype, stored.shape)).encode())
        with stored.path.open("rb") as file:
            file.seek(stored.offset + max(0, stored.nbytes - _SAMPLE) // 2)
            found.update(file.read(min(_SAMPLE, stored.nbytes)))
    return found.hexdigest()


def locate(folder: Path, spec: ModelSpec) -> tuple[dict[str, StoredTensor], StoredTensor | None]:
    """The stored tensor of every parameter, and a tied model's output matrix if it is stored too.

    Raises CheckpointError for all that headers can tell.
    """
    stored = _find_tensors(folder)
    repeated_head = _take_tied_head(stored) if spec.tied else None
    return _match(folder, spec, stored), repeated_head


def stored_dtypes(sources: dict[str, StoredTensor], spec: ModelSpec) -> list[torch.dtype]:
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
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
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
        raise untied(head)
    return head


def untied(head: StoredTensor) -> CheckpointError:
    """The error for a tied model whose output matrix is another than its token matrix."""
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
