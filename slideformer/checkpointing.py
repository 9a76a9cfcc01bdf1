"""Checkpoints of training: all state of a model, to go on from with the same bits, or to export.

    step-40/
        manifest.json           what lies where, checksums, step, numerics, data position; last
        units/L00, …            a unit's master and moments: hi, lo, m, v, one behind another
        model/config.json, …    what a Hugging Face folder has beside the weights

A checkpoint says nothing about where state lay: it is resumed under any budgets, and its numerics
are kept. It appears whole or not at all. Written by a graph of its own, while training goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import fields
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError
from torch import Tensor

from slideformer.checkpoint_info import (
    UNITS,
    CheckpointInfo,
    file_sizes,
    frozen_units,
    model_identity,
    unit_file,
)
from slideformer.graph.adapters import with_adapters
from slideformer.graph.errors import CheckpointError, SlideFormerError
from slideformer.graph.model import Lora, ModelSpec, UnitSpec
from slideformer.graph.plan import Optimizer
from slideformer.models.adapter_files import weights_writer
from slideformer.models.aside import AsideFolder, check_room, write_error
from slideformer.models.context import CheckpointContext
from slideformer.models.families import decoder_config, read_model_config
from slideformer.models.units import model_spec
from slideformer.runtime.checkpoints import MANIFEST, RangeReader, RangeWriter

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MODEL_FOLDER = "model"
"""Within a checkpoint: configuration and tokenizer of the model."""

Files = Mapping[str, str]
_NOTHING: Mapping[str, Any] = MappingProxyType({})


class PendingCheckpoint:
    """A checkpoint whose state is being written; `finish` or `abort` it.

    ``files`` are the small ones of the model's folder. ``skipped`` tells how many steps changed
    nothing, once the state is written. Raises `CheckpointError` if it cannot be begun; nothing is
    left behind then.
    """

    def __init__(
        self,
        output: Path,
        spec: ModelSpec,
        info: CheckpointInfo,
        files: Mapping[str, bytes],
        skipped: Callable[[], int],
    ) -> None:
        self.output = output.absolute()
        self._info = info
        self._skipped = skipped
        sizes = file_sizes(spec, info.compute, info.optimizer)
        self._nbytes = sum(sizes.values())
        self._done: Future[None] | None = None
        check_room(self.output, self._nbytes)
        try:
            self._folder = AsideFolder(self.output)
            try:
                self._writer = RangeWriter(self._folder.path, sizes)
            except BaseException:
                self._folder.abort()
                raise
        except OSError as error:
            raise write_error(self.output, self._nbytes, error) from error
        self._units = {unit.name: unit for unit in spec.units}
        self._files = files
        self.context = CheckpointContext(self)

    @property
    def step(self) -> int:
        """The step it is of."""
        return self._info.step

    def started(self, done: Future[None]) -> None:
        """Its graph is running and ends with ``done``."""
        self._done = done

    def write(self, unit: str, begin: int, parts: Mapping[str, Tensor]) -> None:
        """Write elements of parts of a unit's state; raises `CheckpointError`."""
        of = self._units[unit]
        ranges = {
            self._info.offset(of, part, begin): values.view(torch.uint8).numpy()
            for part, values in parts.items()
        }
        try:
            self._writer.write(unit_file(of), ranges)
        except OSError as error:
            raise write_error(self.output, self._nbytes, error) from error

    def finish(self, files: Files = _NOTHING, training: Mapping[str, Any] = _NOTHING) -> Path:
        """Wait for the state, add ``files`` by name, and put the folder in its place.

        A checkpoint that lies there makes room for it. ``training`` becomes that of the info.
        Raises `CheckpointError`; nothing is left behind then, but for a whole checkpoint that
        cannot be renamed, which stays aside.
        """
        try:
            self._wait()
            for name, content in self._files.items():
                self._writer.add(f"{MODEL_FOLDER}/{name}", content)
            for name, text in files.items():
                self._writer.add(name, text.encode())
            found = {"training": dict(training), "skipped": self._skipped()}
            info = self._info.model_copy(update=found)
            self._writer.finish(info.model_dump(mode="json"))
            return self._folder.move(replace=True)
        except OSError as error:
            raise write_error(self.output, self._nbytes, error) from error
        finally:
            self.abort()

    def abort(self) -> None:
        """Remove what has been written, unless `finish` completed it."""
        if self._done is not None:
            self._done.exception()  # tasks still write until it has ended
        self._writer.close()
        self._folder.abort()

    def abandon(self) -> None:
        """Remove what has been written without waiting for those who still write."""
        self._folder.abort()

    def _wait(self) -> None:
        assert self._done is not None
        try:
            self._done.result()
        except SlideFormerError as error:
            raise CheckpointError(
                f"a step failed, so the state in memory is part old and part new and checkpoint "
                f"{self.output} is not written. The failure: {error}"
            ) from error
        if self.context.errors:
            raise self.context.errors[0]


class Checkpoint:
    """A checkpoint on disk, to resume from or to export.

    Raises `CheckpointError`, with the file at fault, if it is missing, incomplete, altered or of
    another version. Sizes are checked at once, and so are the contents of small files, the
    tokenizer's among them; those of units as they are read.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder).absolute()
        self._reader = RangeReader(self.folder)
        try:
            self.info = CheckpointInfo.model_validate(self._reader.info)
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"]))
            raise CheckpointError(
                f"{self.folder / MANIFEST}: {where}: {problem['msg']}; use another checkpoint"
            ) from None
        for name in self._reader.files:
            if not name.startswith(UNITS):
                self._reader.content(name)

    @property
    def stored(self) -> torch.dtype:
        """The dtype of the weights that training began from."""
        dtype: torch.dtype = getattr(torch, self.info.stored)
        return dtype

    def check_model(self, spec: ModelSpec, optimizer: Optimizer) -> None:
        """Raise `CheckpointError` unless it is of that model, frozen units and optimizer."""
        self._check_identity(spec)
        if self.info.optimizer is not optimizer:
            raise CheckpointError(
                f"{self.folder / MANIFEST}: the checkpoint is of the optimizer "
                f"{self.info.optimizer}, the settings ask for {optimizer}; resume with the same"
            )
        if set(self.info.frozen) != set(frozen_units(spec)):
            found, wanted = (",".join(x) or "none" for x in (self.info.frozen, frozen_units(spec)))
            raise CheckpointError(
                f"{self.folder / MANIFEST}: the checkpoint's frozen units are {found}, those of "
                f"the settings are {wanted}; resume with its parameter_groups"
            )

    def check_config(self, config: PretrainedConfig) -> None:
        """Raise `CheckpointError` if the model's layers compute otherwise than those of the run."""
        path = self.folder / MODEL_FOLDER / "config.json"
        if not path.exists():  # random weights were trained, of no model folder
            return
        found, wanted = (_arithmetic(each) for each in (read_model_config(path.parent), config))
        for name in wanted:
            if found.get(name) != wanted[name]:
                raise CheckpointError(
                    f"{path}: the checkpoint is of another model: its {name} is {found.get(name)}, "
                    f"that of the model is {wanted[name]}"
                )

    def check_base(self, weights: str, model: Path) -> None:
        """Raise `CheckpointError` unless ``weights``, of ``model``, are those of its adapters."""
        if weights != self.info.base_weights:
            raise CheckpointError(
                f"{self.folder}: its adapters belong to other weights than {model} holds now; put "
                f"back those that were in {self.info.base} when training began"
            )

    def _check_identity(self, spec: ModelSpec) -> None:
        found, wanted = self.info.model, model_identity(spec)
        for name in wanted:
            if found.get(name) != wanted[name]:
                raise CheckpointError(
                    f"{self.folder / MANIFEST}: the checkpoint is of another model: its {name} is "
                    f"{found.get(name)}, that of the model is {wanted[name]}"
                )

    def read(self, unit: UnitSpec, part: str, begin: int, into: Tensor) -> None:
        """Fill ``into``, in host memory, with a part of a unit's state from ``begin`` on.

        Raises `CheckpointError` if the bytes are not those that were written.
        """
        offset = self.info.offset(unit, part, begin)
        self._reader.read(unit_file(unit), offset, into.view(torch.uint8).numpy())

    def has_lower(self, unit: UnitSpec) -> bool:
        """Whether it has more of a unit than the upper halves of its master."""
        return self._reader.files[unit_file(unit)] > 2 * unit.numel

    def text(self, name: str) -> str:
        """A file that `PendingCheckpoint.finish` was given; raises `CheckpointError`."""
        if name not in self._reader.files:
            raise CheckpointError(f"{self.folder} has no {name}: no training run wrote it")
        return self._reader.content(name).decode()

    def export(self, output: Path | str) -> Path:
        """Write its weights as a Hugging Face folder, a unit at a time; returns where it lies.

        Adapters become a folder for PEFT. Of a unit that was frozen in BF16 compute it has the
        BF16 weights, and so has the folder. Raises `CheckpointError`, or `UnsupportedModelError` if
        it is of a newer release.
        """
        source = self.folder / MODEL_FOLDER
        spec = model_spec(read_model_config(source))
        if self.info.lora is not None:
            spec = with_adapters(spec, Lora(**self.info.lora))
        self._check_identity(spec)
        masters = _Masters(self, spec)
        with weights_writer(
            source, Path(output), spec, masters, self.stored, base=Path(self.info.base)
        ) as writer:
            for unit in spec.saved_units:
                writer.write_unit(unit.name)
            return writer.finish()


def _arithmetic(config: PretrainedConfig) -> dict[str, Any]:
    """All of a model's configuration that decides what its layers compute."""
    decoder = decoder_config(config)
    rope = {"rope_parameters": config.rope_parameters}
    return rope | {each.name: getattr(decoder, each.name) for each in fields(decoder)}


class _Masters(Mapping[str, tuple[Tensor, Tensor]]):
    """The masters of a checkpoint, read when they are asked for."""

    def __init__(self, checkpoint: Checkpoint, spec: ModelSpec) -> None:
        self._checkpoint, self._spec = checkpoint, spec

    def __getitem__(self, name: str) -> tuple[Tensor, Tensor]:
        unit = self._spec.unit(name)
        hi, lo = (torch.zeros(unit.numel, dtype=torch.int16) for _ in range(2))
        self._checkpoint.read(unit, "hi", 0, hi)
        if self._checkpoint.has_lower(unit):
            self._checkpoint.read(unit, "lo", 0, lo)
        return hi, lo

    def __iter__(self) -> Iterator[str]:
        return (unit.name for unit in self._spec.units)

    def __len__(self) -> int:
        return len(self._spec.units)
