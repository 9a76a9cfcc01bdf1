"""Saving the masters as a Hugging Face checkpoint.

One shard per unit, written in any order and from any thread into a folder aside, which is renamed
to the output when it is complete: the output is whole or absent. Values are written from the
masters in pieces; BF16 needs no conversion at all. Optimizer states are not saved here.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from slideformer.graph.errors import CheckpointError
from slideformer.graph.model import ModelSpec, UnitSpec
from slideformer.kernels.split import join_master
from slideformer.models.safetensors_file import write_file
from slideformer.models.units import MasterWeights

PIECE = 2**15
"""Elements that are converted at a time: of so few, PyTorch's operators run on the calling thread
alone and neither take cores from the training that goes on meanwhile nor wait for them."""

_COMPANIONS = (
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
"""Patterns of the files beside the weights that belong to a model and are copied as they are."""

_HEADROOM = 64 * 2**20
"""Bytes left free beside the weights: for the companions and the file system's own records."""


def check_output(output: Path) -> None:
    """Check that a checkpoint could be saved as ``output``, without leaving anything behind.

    Raises:
        CheckpointError: ``output`` is there and not an empty folder, or it could not be created.
    """
    output = output.absolute()
    if output.is_dir():
        if any(output.iterdir()):
            raise CheckpointError(
                f"output folder {output} is not empty: give another one, or empty it first"
            )
        if output.is_mount():
            raise CheckpointError(
                f"output folder {output} is a mount point and cannot be replaced: give a folder"
                f" within it, such as {output / 'model'}"
            )
    elif output.exists() or output.is_symlink():
        raise CheckpointError(f"output {output} is not a folder: give another path")
    parent = _existing_parent(output)
    probe = parent / f".{output.name}.probe-{os.getpid()}"
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise CheckpointError(
            f"output folder {output} cannot be created in {parent} ({error.strerror or error}):"
            " give a path that you may write to"
        ) from error


class HuggingFaceWriter:
    """Writes one checkpoint; a context manager that removes what is unfinished when it is left.

    Args:
        source: the model folder whose config and tokenizer belong to the weights.
        output: the folder to create.
        spec: the model.
        weights: masters of all units; a unit's are read while :meth:`write_unit` runs.
        dtype: float32, bfloat16 or float16: what the weights are stored as.

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
    ) -> None:
        check_output(output)
        self._source = source
        self._output = output.absolute()
        self._spec = spec
        self._weights = weights
        self._dtype = dtype
        self._bytes = spec.param_count * dtype.itemsize
        self._aside = self._output.parent / f".{self._output.name}.tmp-{os.getpid()}"
        self._shards = {
            unit.name: f"model-{number:05d}-of-{len(spec.units):05d}.safetensors"
            for number, unit in enumerate(spec.units, start=1)
        }
        self._unwritten = set(self._shards)
        self._complete = False
        free = shutil.disk_usage(_existing_parent(self._output)).free
        if self._bytes + _HEADROOM > free:
            raise self._no_room(free)
        with self._cleaned_up():
            # Left by an earlier process of the same id that was killed.
            shutil.rmtree(self._aside, ignore_errors=True)
            self._aside.mkdir(parents=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
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
            write_file(
                self._aside / self._shards[name],
                self._dtype,
                [(param.key, param.shape) for param in unit.params],
                self._pieces(unit),
            )
        self._unwritten.remove(name)

    def finish(self) -> None:
        """Add index, config and tokenizer, and put the folder in its place.

        Raises:
            CheckpointError: as :meth:`write_unit`; or something came to lie at the output
                meanwhile: then the finished folder stays aside, and the message says where.
        """
        assert not self._unwritten, f"units not written: {sorted(self._unwritten)}"
        with self._cleaned_up():
            self._write_index()
            self._write_config()
            self._copy_companions()
            for path in (*self._aside.iterdir(), self._aside):
                _fsync(path)
        # From here on nothing is removed: weights that took hours are not deleted because
        # something took their place.
        self._complete = True
        try:
            os.rename(self._aside, self._output)
        except OSError as error:
            raise CheckpointError(
                f"the checkpoint is complete but cannot be moved to {self._output}"
                f" ({error.strerror or error}): it stays in {self._aside}"
            ) from error
        _fsync(self._output.parent)

    def abort(self) -> None:
        """Remove what has been written, unless :meth:`finish` completed it."""
        if not self._complete:
            # Moved first: a thread that still writes can then add no file while this removes them.
            doomed = self._aside.with_name(f"{self._aside.name}.removed")
            with contextlib.suppress(OSError):
                os.rename(self._aside, doomed)
            shutil.rmtree(doomed, ignore_errors=True)
            shutil.rmtree(self._aside, ignore_errors=True)

    def _pieces(self, unit: UnitSpec) -> Iterator[Tensor]:
        """All values of a unit in the order of its parameters, padding left out."""
        hi, lo = self._weights[unit.name]
        for param in unit.params:
            first, last = param.offset, param.offset + param.numel
            if self._dtype is torch.bfloat16:
                yield hi[first:last].view(torch.bfloat16)
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
            "weight_map": {
                param.key: self._shards[unit.name]
                for unit in self._spec.units
                for param in unit.params
            },
        }
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (self._aside / "model.safetensors.index.json").write_text(text, encoding="utf-8")

    def _write_config(self) -> None:
        """Copy the config, with the dtype that the weights are in now."""
        config = json.loads((self._source / "config.json").read_text(encoding="utf-8"))
        config.pop("torch_dtype", None)  # its name before transformers 5
        config["dtype"] = str(self._dtype).removeprefix("torch.")
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (self._aside / "config.json").write_text(text, encoding="utf-8")

    def _copy_companions(self) -> None:
        for pattern in _COMPANIONS:
            for path in self._source.glob(pattern):
                if path.is_file():
                    target = self._aside / path.relative_to(self._source)
                    target.parent.mkdir(exist_ok=True)
                    shutil.copyfile(path, target)

    @contextmanager
    def _cleaned_up(self) -> Iterator[None]:
        """Remove the folder aside after any failure, and say plainly what the disk refused."""
        try:
            yield
        except OSError as error:
            self.abort()
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                free = shutil.disk_usage(_existing_parent(self._output)).free
                raise self._no_room(free) from error
            raise CheckpointError(f"cannot write checkpoint {self._output}: {error}") from error
        except BaseException:
            self.abort()
            raise

    def _no_room(self, free: int) -> CheckpointError:
        return CheckpointError(
            f"no room for checkpoint {self._output}: it needs {_mib(self._bytes)} and"
            f" {_mib(_HEADROOM)} to spare, free are {_mib(free)}; free some"
            " or give a folder on another disk"
        )


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _existing_parent(path: Path) -> Path:
    """The nearest folder above ``path`` that exists; of a file in the way, the file."""
    return next(parent for parent in path.parents if parent.exists())


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
