"""Saving the masters as a Hugging Face model folder.

One shard per unit, written in any order and from any thread into a folder aside, which is renamed
to the output when it is complete: the output is whole or absent. Values are written from the
masters in pieces; BF16 needs no conversion at all. Optimizer states are not saved here.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Self

import torch
from torch import Tensor

from slideformer.graph.errors import CheckpointError
from slideformer.graph.model import ModelSpec, UnitSpec
from slideformer.kernels.split import join_master
from slideformer.models.aside import (
    AsideFolder,
    check_output,
    check_room,
    fsync,
    remove_orphans,
    write_error,
)
from slideformer.models.safetensors_file import write_file
from slideformer.models.units import MasterWeights
from slideformer.models.weights import stored_values

logger = logging.getLogger(__name__)

Records = Callable[[], Mapping[str, str]]
"""Gives further files of a model folder: their texts by name."""

PIECE = 2**15
"""Elements that are converted at a time: of so few, PyTorch's operators run on the calling thread
alone and neither take cores from the training that goes on meanwhile nor wait for them."""

_CONFIG = "config.json"

_SMALL_FILES = (
    _CONFIG,
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates/*",
    "merges.txt",
    "vocab.*",
    "*.model",
    "tekken.json",
)
"""Patterns of the files beside the weights that belong to a model."""


def small_files(source: Path) -> dict[str, bytes]:
    """The contents of a model folder's files beside the weights, by name: config and tokenizer.

    Empty for a folder that does not exist. Raises `CheckpointError` for a file that cannot be read.
    """
    try:
        return {
            str(path.relative_to(source)): path.read_bytes()
            for pattern in _SMALL_FILES
            for path in source.glob(pattern)
            if path.is_file()
        }
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or source} cannot be read ({error.strerror or error}): it belongs to "
            "the model and is saved with it; make it readable, or download it again"
        ) from error


def saved_nbytes(spec: ModelSpec, dtype: torch.dtype) -> int:
    """Bytes of the weights that are saved of a model, if they are stored in ``dtype``."""
    return sum(unit.param_count for unit in spec.saved_units) * dtype.itemsize


class HuggingFaceWriter:
    """Writes one folder; a context manager that removes what is unfinished when it is left.

    Args:
        source: the model folder that the weights belong to, whose values are taken for frozen units
            without a lower half.
        output: the folder to create.
        spec: the model.
        weights: masters of all units; a unit's are read while :meth:`write_unit` runs.
        dtype: float32, bfloat16 or float16: what the weights are stored as.
        replace: whether a folder that is at ``output`` makes room for this one in the end; files
            that only it has stay.
        files: what `small_files` gave for ``source`` at another time, by default now.

    Raises:
        CheckpointError: see :func:`check_output`; or the disk has not enough room.
    """

    def __init__(
        self,
        source: Path,
        output: Path,
        spec: ModelSpec,
        weights: MasterWeights,
        dtype: torch.dtype,
        *,
        replace: bool = False,
        files: Mapping[str, bytes] | None = None,
    ) -> None:
        check_output(output, replace=replace)
        self._replace = replace
        self._source = source
        self._files = small_files(source) if files is None else files
        self._output = output.absolute()
        self._spec = spec
        self._weights = weights
        self._dtype = dtype
        units = spec.saved_units
        self._bytes = saved_nbytes(spec, dtype)
        self._shards = {
            unit.name: f"model-{number:05d}-of-{len(units):05d}.safetensors"
            for number, unit in enumerate(units, start=1)
        }
        self._unwritten = set(self._shards)
        remove_orphans(self._output)
        check_room(self._output, self._bytes, spare=False)  # better filled to the brim than lost
        try:
            self._folder = AsideFolder(self._output)
        except OSError as error:
            raise write_error(self._output, self._bytes, error) from error
        self._aside = self._folder.path

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()

    def write_unit(self, name: str) -> None:
        """Write the shard of one unit; every unit exactly once, in any order, from any thread.

        Raises:
            CheckpointError: the disk is full or failing, or a value does not fit into float16. The
                folder aside is gone then and the writer of no more use.
        """
        assert name in self._unwritten, f"{name} is unknown or was written before"
        unit = self._spec.unit(name)
        with self._cleaned_up():
            self._write_shard(unit)
        self._unwritten.remove(name)

    def finish(self, records: Mapping[str, str] = MappingProxyType({})) -> Path:
        """Add index, config and tokenizer, and put the folder in its place; returns where it lies.

        That is the output, or if something came to lie there meanwhile a free name beside it.
        ``records`` are further files by name.

        Raises:
            CheckpointError: as :meth:`write_unit`; or the finished folder cannot be moved, and then
                stays where the message says.
        """
        assert not self._unwritten, f"units not written: {sorted(self._unwritten)}"
        with self._cleaned_up():
            self._write_index()
            self._write_config()
            for name, content in self._files.items():
                target = self._aside / name
                if name != _CONFIG:
                    target.parent.mkdir(exist_ok=True)
                    target.write_bytes(content)
            for name, text in records.items():
                (self._aside / name).write_text(text, encoding="utf-8")
            for path in self._aside.rglob("*"):
                fsync(path)
        if self._replace and self._output.is_dir():
            self._keep_others()
        try:
            return self._folder.move(replace=self._replace)
        except (OSError, CheckpointError) as error:
            raise CheckpointError(
                f"the checkpoint is complete but cannot be moved to {self._output} ({error}): it"
                f" stays in {self._aside}"
            ) from error

    def abort(self) -> None:
        """Remove what has been written, unless :meth:`finish` completed it."""
        self._folder.abort()

    def _keep_others(self) -> None:
        """Take over what others put into the folder that is to make room; without a copy if it can.

        If something cannot be taken over, the folder stays and this one goes beside it.
        """

        def ours(folder: str, names: list[str]) -> set[str]:
            here = self._aside / Path(folder).relative_to(self._output)
            return {name for name in names if (here / name).is_file()}

        try:
            shutil.copytree(
                self._output,
                self._aside,
                symlinks=True,
                ignore=ours,
                copy_function=_link,
                dirs_exist_ok=True,
            )
        except OSError as error:
            logger.warning("%s cannot be replaced: %s", self._output, error)
            self._replace = False

    def _write_shard(self, unit: UnitSpec) -> None:
        write_file(
            self._aside / self._shards[unit.name],
            self._dtype,
            [(param.key, param.shape) for param in unit.params],
            self._pieces(unit),
        )

    def _pieces(self, unit: UnitSpec) -> Iterator[Tensor]:
        """All values of a unit in the order of its parameters, padding left out."""
        hi, lo = self._weights[unit.name]
        for param in unit.params:
            first, last = param.offset, param.offset + param.numel
            if self._dtype is torch.bfloat16:
                yield hi[first:last].view(torch.bfloat16)
                continue
            if not len(lo):  # frozen: what the upper half leaves out is still in the source
                for piece in stored_values(self._source, self._spec, param):
                    yield piece.to(self._dtype)
                continue
            for begin in range(first, last, PIECE):
                end = min(begin + PIECE, last)
                values = torch.empty(end - begin)
                join_master(hi[begin:end], lo[begin:end], values)
                narrow = values.to(self._dtype)
                if narrow.isinf().any() and not values.isinf().any():
                    raise CheckpointError(
                        f"{param.key} has a value of magnitude {values.abs().max().item():.3g},"
                        f" beyond the range of {self._dtype}: start from a checkpoint in bfloat16"
                        " or float32"
                    )
                yield narrow

    def _write_index(self) -> None:
        index = {
            "metadata": {"total_parameters": self._spec.param_count, "total_size": self._bytes},
            "weight_map": dict(
                sorted(
                    (param.key, self._shards[unit.name])
                    for unit in self._spec.units
                    for param in unit.params
                )
            ),
        }
        self._write_json("model.safetensors.index.json", index)

    def _write_config(self) -> None:
        """Copy the config, with the dtype that the weights are in now."""
        if _CONFIG not in self._files:
            raise CheckpointError(
                f"{self._source} had no {_CONFIG}, without which weights cannot be saved: give a "
                "model folder"
            )
        config = json.loads(self._files[_CONFIG])
        config.pop("torch_dtype", None)  # its name before transformers 5
        config["dtype"] = str(self._dtype).removeprefix("torch.")
        self._write_json(_CONFIG, config)

    def _write_json(self, name: str, content: Mapping[str, object]) -> None:
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (self._aside / name).write_text(text, encoding="utf-8")

    @contextmanager
    def _cleaned_up(self) -> Iterator[None]:
        """Remove the folder aside after any failure, and say plainly what the disk refused."""
        try:
            yield
        except OSError as error:
            self.abort()
            raise write_error(self._output, self._bytes, error) from error
        except BaseException:
            self.abort()
            raise


def _link(source: str, target: str) -> None:
    """Give a file a second name, or copy it where the file system has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
