"""Reading and writing of single safetensors files, piece by piece.

The format: 8 bytes header length (little endian), a JSON header with dtype, shape and byte range of
every tensor, then the bytes. Reading goes through ``pread`` into the caller's buffer and not
through a memory map, whose pages count as the process's memory while they are mapped; writing takes
the values as they come. Which tensors a model needs is not known here.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slideformer.graph.errors import CheckpointError

DTYPES: dict[str, torch.dtype] = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
"""The dtypes that weights may be stored in, by their names in the format."""

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_HEADER_LIMIT = 100_000_000
"""Bytes; the format allows no longer header."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file: ``offset`` is that of its first byte in ``path``, ``dtype`` the
    format's name for its element type."""

    path: Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file by name.

    Raises:
        CheckpointError: the file is missing, not in the format, or shorter than its header says.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(_HEADER_LIMIT, size - 8):
                raise CheckpointError(
                    f"{path} ({size} bytes) is not a safetensors file or is cut short: download it"
                    " again"
                )
            header = json.loads(file.read(length))
        tensors = {
            key: _stored_tensor(path, key, entry, 8 + length)
            for key, entry in header.items()
            if key != "__metadata__"
        }
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"the header of {path} is damaged ({error!r}): download the file again"
        ) from error
    end = max((tensor.offset + tensor.nbytes for tensor in tensors.values()), default=0)
    if end > size:
        last = max(tensors.values(), key=lambda tensor: tensor.offset)
        raise CheckpointError(
            f"{path} is cut short: its tensors, the last of them {last.key}, need {end} bytes, it"
            f" has {size}; download it again"
        )
    return tensors


def _stored_tensor(path: Path, key: str, entry: dict[str, Any], data_start: int) -> StoredTensor:
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    dtype = entry["dtype"]
    if not all(type(number) is int and number >= 0 for number in (begin, end, *shape)):
        raise ValueError(f"tensor {key}: shape {list(shape)} in bytes {begin} to {end}")
    known = DTYPES.get(dtype)
    if end < begin or (known is not None and end - begin != math.prod(shape) * known.itemsize):
        raise ValueError(f"tensor {key}: {end - begin} bytes for shape {list(shape)} in {dtype}")
    return StoredTensor(path, key, dtype, shape, data_start + begin, end - begin)


def read_range(tensor: StoredTensor, begin: int, into: memoryview) -> None:
    """Fill ``into`` with the tensor's bytes from byte ``begin`` on. The GIL is released meanwhile.

    Raises:
        CheckpointError: the file cannot be read or ends too early.
    """
    try:
        descriptor = os.open(tensor.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            filled = 0
            while filled < len(into):
                count = os.preadv(descriptor, [into[filled:]], tensor.offset + begin + filled)
                if count == 0:
                    raise CheckpointError(f"{tensor.path} ends within tensor {tensor.key}")
                filled += count
        finally:
            os.close(descriptor)
    except OSError as error:
        raise CheckpointError(
            f"cannot read tensor {tensor.key} of {tensor.path}: {error.strerror or error}"
        ) from error


def write_file(
    path: Path,
    dtype: torch.dtype,
    tensors: Sequence[tuple[str, tuple[int, ...]]],
    pieces: Iterable[Tensor],
) -> None:
    """Write a new file and ``fsync`` it.

    ``tensors`` gives names and shapes in the order of the values; ``pieces`` yields all values in
    that order as contiguous 1-D CPU tensors of ``dtype``, cut as the caller likes.

    Raises:
        OSError: from the file system.
    """
    # Every loader of Hugging Face asks for this entry.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    total = 0
    for key, shape in tensors:
        end = total + math.prod(shape) * dtype.itemsize
        header[key] = {
            "dtype": _DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [total, end],
        }
        total = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # so that the values start at a multiple of 8 bytes
    written = 0
    with path.open("xb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for piece in pieces:
            assert piece.dtype is dtype
            written += file.write(piece.view(torch.uint8).numpy().data)
        assert written == total, f"{written} bytes of values for a header of {total}"
        file.flush()
        os.fsync(file.fileno())
