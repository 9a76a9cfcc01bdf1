"""Sizes of units and their chunks on a base, by the first streamed layer where that matters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from slideformer.graph.chunks import chunk_unit
from slideformer.graph.model import ModelSpec, UnitSpec
from slideformer.graph.plan import MemoryPlan
from slideformer.graph.state import state_nbytes
from slideformer.graph.step_gradients import CHECK_NBYTES
from slideformer.memory.layout import Ints, Number, aligned


class Chunks:
    """``embed`` and the output matrix (``sweep`` parts of at most ``largest_part`` elements) in
    chunks, and of the layers from each position on:

    ``largest_layer``, ``largest_loaded``: elements of the largest, and of the largest chunk of
    these and the norm. ``layers_at_rest``: bytes of weights and state. And of those before each
    position, which are then resident, the trained ones: how many they are (``trained_before``), and
    bytes of their gradients (``parked``).
    """

    def __init__(self, spec: ModelSpec, base: MemoryPlan) -> None:
        self._base = base
        cut = {
            unit.name: chunk_unit(spec, unit, base.chunk_numel, base.vocab_chunks)
            for unit in spec.units
        }
        numels = {name: [chunk.numel for chunk in chunks] for name, chunks in cut.items()}
        head = cut[spec.head.name]
        parts: dict[int, int] = {}
        for chunk in head:
            parts[chunk.vocab] = parts.get(chunk.vocab, 0) + chunk.numel
        self.sweep, self.largest_part = len(parts), max(parts.values())
        self.embed = numels["embed"]
        self.largest_head = max(numels[spec.head.name])
        layers = spec.layers
        trained = [unit for unit in (*layers, *spec.adapters.values()) if not unit.frozen]
        self.largest_layer = _suffixes([unit.numel for unit in layers], max)
        self.largest_trained = max((unit.numel for unit in trained), default=0)
        self.layers_at_rest = _suffixes([self.at_rest(unit) for unit in layers], sum)
        loaded = _suffixes([max(numels[unit.name]) for unit in layers], max)
        always = [spec.norm, *spec.adapters.values()]
        self.largest_loaded = np.maximum(loaded, max(max(numels[u.name]) for u in always))
        size = base.compute.nbytes
        self.trained_before = np.cumsum([0, *(not unit.frozen for unit in layers)])
        self.parked = np.cumsum(
            [0, *(0 if unit.frozen else aligned(size * unit.numel) for unit in layers)]
        )
        # Of trained units: those of the norm always travel.
        trains = [spec.adapters.get(unit.name, unit) for unit in layers]
        sent = [
            [] if unit.frozen or unit.name in base.resident else numels[unit.name]
            for unit in trains
        ]
        norm = [] if spec.norm.frozen else numels[spec.norm.name]
        self._head = [] if spec.head.frozen else numels[spec.head.name]
        self._untied = [] if spec.tied else self._head
        self._sent = _suffixes([len(each) for each in sent], sum) + len(norm)
        self._largest = np.maximum(
            _suffixes([max(each, default=0) for each in sent], max), max(norm, default=0)
        )
        travelled = [sum(aligned(self.travelling(n)) for n in each) for each in sent]
        rest = sum(aligned(self.travelling(n)) for n in (*norm, *self._untied))
        self._travelled = _suffixes(travelled, sum) + rest

    def at_rest(self, unit: UnitSpec) -> int:
        """Bytes of a unit's weights and state, wherever they are."""
        return aligned(2 * unit.numel) + aligned(state_nbytes(unit, self._base))

    def staged(self, first: Ints, head: Ints) -> Ints:
        """Chunks of gradients that go down, with those of the output matrix where ``head``."""
        return self._sent[first] + head * len(self._head)

    def largest_staged(self, first: Ints, head: Ints) -> Ints:
        """Elements of the largest of those."""
        return np.maximum(self._largest[first], head * max(self._head, default=0))

    def travelled(self, first: Ints) -> Ints:
        """Bytes of all of them on the host, those of a tied matrix not counted."""
        return self._travelled[first]

    def travelling(self, numel: Number) -> Number:
        """Bytes of a gradient chunk on its way."""
        return self._base.compute.nbytes * numel + CHECK_NBYTES


def _suffixes(values: Sequence[int], join: Callable[[Sequence[int]], int]) -> Ints:
    """``join`` of all values from each position on, and of none."""
    return np.array([join([0, *values[i:]]) for i in range(len(values) + 1)], np.int64)
