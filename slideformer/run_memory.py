"""All memory of a run: the arenas, the store of what is on NVMe, and the units' state in both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slideformer.graph.buffers import Buffer, Tier
from slideformer.graph.chunks import chunk_unit
from slideformer.graph.errors import ConfigError
from slideformer.graph.graph import TaskGraph
from slideformer.graph.model import ModelSpec
from slideformer.graph.plan import MemoryPlan
from slideformer.graph.state import Part, state_parts
from slideformer.graph.step_nvme import (
    HI,
    LO,
    extent_nbytes,
    in_memory,
    kind_parts,
    units_on_nvme,
)
from slideformer.memory.arena import Arenas
from slideformer.memory.extents import Extent, lay_out_extents
from slideformer.memory.layout import lay_out, places
from slideformer.models.state import UnitState, arrays
from slideformer.runtime.device import Binding
from slideformer.runtime.nvme import NvmeStore, open_store
from slideformer.runtime.store import TieredMemory, transfer_bindings

StateSource = Callable[[str, int, Tensor], None]
"""Fills a one-dimensional host tensor with a part of a unit's state from an element on."""

_PIECE = 16 << 20
"""Elements that go to the GPU at a time."""


class RunMemory:
    """The memory that the graphs of a run work on; `close` gives it back.

    ``shared`` puts places into the memory of others, as :func:`slideformer.memory.layout.lay_out`.

    Raises `ConfigError` if the plan needs NVMe and there is no folder, `StoreError` if the folders
    cannot be used, `BudgetError` or `DeviceError` if the system refuses memory.
    """

    def __init__(
        self,
        spec: ModelSpec,
        plan: MemoryPlan,
        graphs: Sequence[TaskGraph],
        device: torch.device,
        folders: Sequence[Path],
        *,
        checksums: bool,
        shared: Mapping[str, str] | None = None,
    ) -> None:
        self._spec, self._plan = spec, plan
        self._kinds = units_on_nvme(spec, plan)
        wanted = places(graphs)
        stored = {name: nbytes for name, (tier, nbytes) in wanted.items() if tier is Tier.NVME}
        held = {name: place for name, place in wanted.items() if name not in stored}
        self._extents = lay_out_extents(stored)
        if stored and not folders:
            raise ConfigError("the plan needs NVMe, but nvme is not set; name a folder with --nvme")
        self.store: NvmeStore | None = None
        if stored:
            self.store = open_store(folders, self._extents, checksums=checksums)
        try:
            self.arenas = Arenas(lay_out(held, shared), held, device)
        except BaseException:
            self._close_store()
            raise
        self.states: dict[str, UnitState] = {}
        for unit in spec.units:
            hi, state = (
                self.arenas.place(place) if (place := f"{kind}.{unit.name}") in held else None
                for kind in ("hi", "state")
            )
            parts = in_memory(unit, plan, self._kinds.get(unit.name, ()))
            self.states[unit.name] = UnitState.of(unit.numel, parts, hi, state)

    def view(self, buffer: Buffer) -> Any:
        """The bytes of a buffer, uint8 [nbytes], or its extent."""
        return TieredMemory(self.arenas, self._extents).view(buffer)

    def bindings(self) -> dict[str, Binding]:
        """Bindings of the transfers to and from NVMe."""
        return {} if self.store is None else transfer_bindings(self.store)

    def masters(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Both halves of every unit; those on NVMe share one place each, a unit at a time.

        A frozen unit may have no lower half.
        """
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for unit in self._spec.units:
            state, kinds = self.states[unit.name], self._kinds.get(unit.name, ())
            hi, lo = (
                self.arenas.place(f"saved_{kind}")[: 2 * unit.numel].view(torch.int16)
                if kind in kinds
                else half
                for kind, half in ((HI, state.hi), (LO, state.lo))
            )
            found[unit.name] = (hi, lo)
        return found

    def saved_masters(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The same as the graph of a save leaves them: resident units pass through one place."""
        found = self.masters()
        saved = (unit.name for unit in self._spec.saved_units)
        for name in self._plan.resident.intersection(saved):
            sizes = [len(half) for half in found[name]]
            staged = self.arenas.place("saved")[: 2 * sum(sizes)]
            hi, lo = staged.view(torch.int16).split(sizes)
            found[name] = (hi, lo)
        return found

    def put(self, unit: str, hi: Tensor, lo: Tensor) -> None:
        """Write a unit's halves, int16 [n], to NVMe as far as they belong there.

        Nothing may be in flight. Raises `StoreError`.
        """
        for kind, half in ((HI, hi), (LO, lo)):
            if kind in self._kinds.get(unit, ()):
                for extent, begin, end in self._chunks(kind, unit):
                    staged = self._staged(extent)
                    staged[: 2 * (end - begin)].view(torch.int16).copy_(half[begin:end])
                    self._write(extent, staged)

    def load(self, unit: str, source: StateSource) -> None:
        """Fill a unit's state, wherever it lies, from ``source``.

        Nothing may be in flight. Raises `StoreError`, and whatever ``source`` raises.
        """
        state, spec = self.states[unit], self._spec.unit(unit)
        for part in state_parts(spec, self._plan.compute, self._plan.optimizer):
            target: Tensor = getattr(state, part.name)
            if target.is_cuda:
                for begin in range(0, spec.numel, _PIECE):
                    piece = getattr(state.part(begin, begin + _PIECE), part.name)
                    values = torch.empty_like(piece, device="cpu")
                    source(part.name, begin, values)
                    piece.copy_(values)
            elif len(target):
                source(part.name, 0, target)
        for kind in self._kinds.get(unit, ()):
            for extent, begin, end in self._chunks(kind, unit):
                staged = self._staged(extent)
                for name, values in arrays(staged, self._parts(kind, unit), end - begin).items():
                    source(name, begin, values)
                self._write(extent, staged)

    def whole(self, unit: str) -> UnitState:
        """A unit's state, with what is on NVMe read into host memory.

        Nothing may be in flight. Raises `StoreError`.
        """
        state = self.states[unit]
        for kind in self._kinds.get(unit, ()):
            parts = self._parts(kind, unit)
            read = [
                arrays(self._read(extent), parts, end - begin)
                for extent, begin, end in self._chunks(kind, unit)
            ]
            names = [part.name for part in parts]
            state = replace(state, **{n: torch.cat([each[n] for each in read]) for n in names})
        return state

    def close(self) -> None:
        """Give the memory back and remove the files; nothing may be in flight."""
        self.states.clear()
        self.arenas.close()
        self._close_store()

    def _close_store(self) -> None:
        if self.store is not None:
            self.store.close()

    def _parts(self, kind: str, unit: str) -> tuple[Part, ...]:
        return kind_parts(kind, self._spec.unit(unit), self._plan.optimizer)

    def _chunks(self, kind: str, unit: str) -> list[tuple[Extent, int, int]]:
        """The extents of a unit, each with the range of elements that it holds."""
        plan = self._plan
        spec = self._spec.unit(unit)
        chunks = chunk_unit(self._spec, spec, plan.chunk_numel, plan.vocab_chunks)
        found = []
        for chunk in chunks:
            extent = self._extents[f"{kind}.{unit}.{chunk.label}"]
            assert extent.nbytes == extent_nbytes(self._parts(kind, unit), chunk.numel)
            found.append((extent, chunk.begin, chunk.end))
        return found

    def _staged(self, extent: Extent) -> Tensor:
        """Host memory for an extent, in a slot of the step's: a load needs none beside the plan."""
        return self.arenas.place("staged.0")[: extent.nbytes]

    def _read(self, extent: Extent) -> Tensor:
        assert self.store is not None
        staged = self._staged(extent)
        self.store.read(extent, staged.numpy().data).result()
        return staged.clone()

    def _write(self, extent: Extent, staged: Tensor) -> None:
        assert self.store is not None
        self.store.write(extent, staged.numpy().data).result()
