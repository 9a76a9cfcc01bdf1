"""The slots and buffers of a step: what is shared by all its parts, weights, state and inputs.

Activations are in ``step_activations.py``, gradients in ``step_gradients.py``, what is on NVMe in
``step_nvme.py``.

Slots (the same names and sizes in every graph of a run, so that graphs can follow one another):

    w.k, w.head, w.norm   GPU      weights of layers, of a whole output matrix, of the final norm
    acc.0, acc.head, …    GPU      gradient accumulators
    g.k                   GPU      finished gradient chunks on their way down
    kept.k                GPU      what a layer keeps from forward to backward
    x.k                   GPU      boundaries: a layer's input, or its gradient, of one micro-batch
    hi.U, state.U         pinned, cpu   master's upper halves; lower halves with the moments
                          (both on the GPU for a resident unit; less what is on NVMe)
    gh.k, parked.c        pinned   gradient chunks waiting for their update
    parked.U              GPU      the same of a resident unit
    xh.U, kh.U            pinned   offloaded boundaries, spilled activations
    wh.k, xs.k            pinned   weights and boundaries between NVMe and the GPU
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property

from slideformer.graph.buffers import Role, Tier
from slideformer.graph.builder import GraphBuilder
from slideformer.graph.chunks import Chunk, chunk_unit
from slideformer.graph.graph import TaskGraph
from slideformer.graph.model import ModelSpec
from slideformer.graph.placing import Visit
from slideformer.graph.plan import Compute, MemoryPlan
from slideformer.graph.state import HALVES, Part, parts_nbytes
from slideformer.graph.step_activations import Activations
from slideformer.graph.step_gradients import Gradients
from slideformer.graph.step_nvme import HI, RINGS, StoredState
from slideformer.graph.tasks import Cost, TaskKind


class StepMemory:
    """Declares buffers on first use and appends copy tasks; `build` adds the slots."""

    def __init__(self, spec: ModelSpec, plan: MemoryPlan, name: str) -> None:
        self.spec = spec
        self.plan = plan
        self.visits: list[Visit] = []
        self._builder = GraphBuilder(name)
        self._nbytes: dict[str, int] = {}
        self._slots: set[str] = set()
        self._places: dict[str, tuple[Tier, int]] = {}
        self._loaded: dict[str, list[str]] = {}
        self.task = self._builder.task
        self.activations = Activations(self)
        self.gradients = Gradients(self)
        self.stored = StoredState(self)

    @cached_property
    def chunks(self) -> Mapping[str, tuple[Chunk, ...]]:
        """The chunks of every unit."""
        spec, plan = self.spec, self.plan
        return {
            unit.name: chunk_unit(spec, unit, plan.chunk_numel, plan.vocab_chunks)
            for unit in spec.units
        }

    def build(self) -> TaskGraph:
        """Declare all slots and finish the graph."""
        self._declare_slots()
        return self._builder.build()

    def unchecked(self) -> TaskGraph:
        """The same graph for who will not run it: no rule is checked."""
        self._declare_slots()
        return self._builder.unchecked()

    def _declare_slots(self) -> None:
        places = self.places()
        for name in places:
            if name in self._slots:
                self._builder.slot(name, *places[name])

    def places(self) -> dict[str, tuple[Tier, int]]:
        """Tier and bytes of every slot, and of every buffer without one, used so far."""
        for name, nbytes in self.activations.slots().items():
            self._slots.add(name)
            self._places[name] = (Tier.GPU, nbytes)
        for ring in ("w", "g", *RINGS):  # slots that take turns are equally large
            used = [name for name in self._slots if re.fullmatch(rf"{ring}\.\d+", name)]
            if used:
                tier, nbytes = max(self._places[name] for name in used)
                if ring in RINGS:
                    used = [f"{ring}.{i}" for i in range(self.plan.nvme_slots)]
                self._slots.update(used)
                self._places |= dict.fromkeys(used, (tier, nbytes))
        return dict(self._places)

    # -- declaring -------------------------------------------------------------------------------

    def buffer(
        self,
        name: str,
        nbytes: int,
        tier: Tier,
        role: Role,
        *,
        slot: str = "",
        offset: int = 0,
        carried: bool = False,
    ) -> str:
        """Declare a buffer once; its slot, if it has one, grows to hold it. Returns its name."""
        if name not in self._nbytes:
            self._nbytes[name] = nbytes
            place = slot or name
            _, size = self._places.get(place, (tier, 0))
            self._places[place] = (tier, max(size, offset + nbytes))
            if slot:
                self._slots.add(slot)
            self._builder.buffer(
                name, nbytes, tier, role=role, slot=slot, offset=offset, carried=carried
            )
        return name

    def nbytes(self, name: str) -> int:
        """Bytes of a buffer that has been declared."""
        return self._nbytes[name]

    def copy(self, name: str, kind: TaskKind, source: str, target: str) -> None:
        """Append a copy of a whole buffer; one of both may be larger, to fill pages for NVMe."""
        cost = Cost(nbytes=min(self._nbytes[source], self._nbytes[target]))
        self.task(name, kind, op="copy", reads=[source], writes=[target], cost=cost)

    # -- weights and optimizer state -------------------------------------------------------------

    def resident(self, unit: str) -> bool:
        """Whether a unit's weights and optimizer state stay on the GPU."""
        return unit in self.plan.resident

    def hi(self, chunk: Chunk) -> str:
        """Upper halves of a chunk's master: its BF16 weights, 2 bytes per element."""
        return self._owned(chunk, "hi", HALVES[:1], Tier.PINNED, Role.WEIGHT)

    def state(self, chunk: Chunk) -> list[str]:
        """Lower halves and moments of a chunk, as far as it has them and they are not on NVMe."""
        parts = self.stored.not_there(self.spec.unit(chunk.unit))
        return [self._owned(chunk, "state", parts, Tier.CPU, Role.OPTIMIZER)] if parts else []

    def owned(self, chunk: Chunk) -> list[str]:
        """What a chunk owns in memory: upper halves and state, as far as they are not on NVMe."""
        hi = [] if self.stored.has(HI, chunk.unit) else [self.hi(chunk)]
        return [*hi, *self.state(chunk)]

    def _owned(self, chunk: Chunk, kind: str, parts: Sequence[Part], tier: Tier, role: Role) -> str:
        offset = parts_nbytes(parts, chunk.begin)
        return self.buffer(
            f"{kind}.{chunk.unit}.{chunk.label}",
            parts_nbytes(parts, chunk.end) - offset,
            Tier.GPU if self.resident(chunk.unit) else tier,
            role,
            slot=f"{kind}.{chunk.unit}",
            offset=offset,
            carried=True,
        )

    def weights(
        self, key: str, chunks: Sequence[Chunk], purpose: str, *, slot: str = ""
    ) -> list[str]:
        """Buffers on the GPU that hold the weights of adjacent chunks.

        Resident units are used where they are. Others come up into ``slot``, or without one into
        the slot of the window that the next of `visits` names, unless it still holds them.
        """
        if self.resident(chunks[0].unit):
            return [self.hi(chunk) for chunk in chunks]
        if slot:
            return self._load_chunks(chunks, slot, purpose)
        visit = self.visits.pop(0)
        if visit.load:
            self._loaded[key] = self._load_chunks(chunks, f"w.{visit.slot}", purpose)
        return self._loaded[key]

    def loaded(self, chunk: Chunk) -> str:
        """The buffer in the window that holds the weights of a layer's chunk now."""
        return self._loaded[chunk.unit][chunk.index]

    def _load_chunks(self, chunks: Sequence[Chunk], slot: str, purpose: str) -> list[str]:
        return [self._load(chunk, slot, purpose, chunks[0].begin) for chunk in chunks]

    def _load(self, chunk: Chunk, slot: str, purpose: str, origin: int) -> str:
        size = self.plan.compute.nbytes
        name = f"{chunk.unit}.{purpose}.{chunk.label}"
        weight = self.buffer(
            f"w.{name}",
            size * chunk.numel,
            Tier.GPU,
            Role.WEIGHT,
            slot=slot,
            offset=size * (chunk.begin - origin),
        )
        if self.plan.compute is Compute.BF16:
            stored = self.stored.has(HI, chunk.unit)
            hi = self.stored.read_weights(chunk, purpose) if stored else self.hi(chunk)
            self.copy(f"h2d.{name}", TaskKind.H2D, hi, weight)
            return weight
        halves = self.buffer(
            f"halves.{name}", 4 * chunk.numel, Tier.GPU, Role.WEIGHT, slot="halves"
        )
        self.task(
            f"h2d.{name}",
            TaskKind.H2D,
            op="upload_halves",
            reads=self.owned(chunk),
            writes=[halves],
            cost=Cost(nbytes=4 * chunk.numel),
            unit=chunk.unit,
            begin=chunk.begin,
            end=chunk.end,
        )
        self.task(
            f"join.{name}",
            TaskKind.COMPUTE,
            reads=[halves],
            writes=[weight],
            cost=Cost(nbytes=8 * chunk.numel),
        )
        return weight

    @cached_property
    def constants(self) -> list[str]:
        """Made before the first step: tables of cosines and sines, and masks.

        Tables are FP32 [ropes, 2, seq_len, rotary_dim]. Packed runs have no masks, as their
        documents differ from step to step.
        """
        seq_len = self.plan.seq_len
        nbytes = 8 * self.spec.ropes * seq_len * self.spec.rotary_dim
        names = [self.buffer("rope", nbytes, Tier.GPU, Role.CONSTANT, carried=True)]
        for window in self.spec.windows:
            if window < seq_len and not self.plan.packed:
                mask = f"mask.{window}"
                square = seq_len * seq_len
                names.append(self.buffer(mask, square, Tier.GPU, Role.CONSTANT, carried=True))
        return names

    # -- inputs and the loss ---------------------------------------------------------------------

    @property
    def documents_nbytes(self) -> int:
        """Bytes of a packed step's positions and document starts, int32 [2·T + micro-batches]."""
        return 4 * (2 * self.plan.tokens + self.plan.micro_batches)

    @property
    def index_nbytes(self) -> int:
        """Bytes of the row index that updates of a resident embedding use: int64 [3·T + V + 3]."""
        return 8 * (3 * self.plan.tokens + self.spec.vocab + 3)

    @cached_property
    def loss(self) -> str:
        """The step's loss so far, one FP32."""
        return self.buffer("loss", 4, Tier.GPU, Role.RESULT)

    @cached_property
    def host_loss(self) -> str:
        """The loss in pinned memory."""
        return self.buffer("loss_host", 4, Tier.PINNED, Role.RESULT)

    @cached_property
    def balance(self) -> str:
        """Statistics of the experts' load in all layers and micro-batches, FP32 [2·E + 1]."""
        nbytes = 4 * (2 * self.spec.balanced + 1)
        return self.buffer("balance", nbytes, Tier.GPU, Role.ACTIVATION)

    def softmax_stats(self, m: int) -> str:
        """Running maximum, sum and target logit of each token, FP32 [3, micro_tokens]."""
        nbytes = 12 * self.plan.micro_tokens
        return self.buffer(f"softmax.m{m}", nbytes, Tier.GPU, Role.ACTIVATION)

    def norm_output_gradient(self, m: int) -> str:
        """Gradient of the final norm's output, FP32 [micro_tokens, hidden]."""
        nbytes = 4 * self.plan.micro_tokens * self.spec.hidden
        return self.buffer(f"dxn.m{m}", nbytes, Tier.GPU, Role.ACTIVATION)
