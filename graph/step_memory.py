"""The slots and buffers of a step, and the copies between them.

Slots (the same names and sizes in every graph of a run, so that graphs can follow one another):

    w.k, w.head, w.norm   GPU      weights of layers, of a whole output matrix, of the final norm
    acc.0, acc.head, …    GPU      gradient accumulators
    g.k                   GPU      finished gradient chunks on their way down
    kept.k                GPU      an MLP's projections kept from forward to backward
    x.k                   GPU      boundaries: a layer's input, or its gradient, of one micro-batch
    hi.U, state.U         pinned, cpu   master's upper halves; lower halves with both moments
                          (both on the GPU for a resident unit)
    gh.k, parked.c        pinned   gradient chunks waiting for their update
    xh.U, kh.U            pinned   offloaded boundaries, spilled projections
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

from slideformer.graph.buffers import Role, Tier
from slideformer.graph.builder import GraphBuilder
from slideformer.graph.chunks import Chunk, chunk_unit
from slideformer.graph.graph import TaskGraph
from slideformer.graph.model import ModelSpec, UnitSpec
from slideformer.graph.placing import SlotPool, Visit
from slideformer.graph.plan import Compute, MemoryPlan
from slideformer.graph.tasks import Cost, TaskKind

STATE_NBYTES = 10
"""Bytes per element beside the master's upper half: its lower half (2) and two moments (4 + 4)."""

CHECK_NBYTES = 256
"""Bytes behind each travelling gradient chunk for its norm (4 used; keeps chunks aligned)."""


SPILL_SLOTS = 3
"""GPU slots through which spilled projections pass: one computed, one copied, one free."""


class StepMemory:
    """Declares buffers on first use and appends copy tasks; `build` adds the slots."""

    def __init__(self, spec: ModelSpec, plan: MemoryPlan, name: str) -> None:
        self.spec = spec
        self.plan = plan
        self.visits: list[Visit] = []
        self.boundaries: dict[tuple[str, int], str] = {}
        self.projections: dict[tuple[str, int], str] = {}
        self._builder = GraphBuilder(name)
        self._nbytes: dict[str, int] = {}
        self._slots: set[str] = set()
        self._places: dict[str, tuple[Tier, int]] = {}
        self._pool = SlotPool("x", plan.boundary_slots)
        ring = SPILL_SLOTS if plan.spilled else 0
        self._kept_pool = SlotPool("kept", plan.kept * plan.micro_batches + ring)
        self._pool_slot: dict[str, tuple[SlotPool, str]] = {}
        self._loaded: dict[str, list[str]] = {}
        self._staged = 0
        self._downloaded = 0
        self.task = self._builder.task

    @cached_property
    def chunks(self) -> Mapping[str, tuple[Chunk, ...]]:
        """The chunks of every unit."""
        spec, plan = self.spec, self.plan
        return {
            unit.name: chunk_unit(spec, unit, plan.chunk_numel, plan.vocab_chunks)
            for unit in spec.units
        }

    @cached_property
    def boundary_nbytes(self) -> int:
        """Bytes of one micro-batch's boundary [micro_rows, seq_len, hidden]."""
        return self.plan.micro_tokens * self.spec.hidden * self.plan.compute.nbytes

    def build(self) -> TaskGraph:
        """Declare all slots and finish the graph."""
        places = self.places()
        for name in places:
            if name in self._slots:
                self._builder.slot(name, *places[name])
        return self._builder.build()

    def places(self) -> dict[str, tuple[Tier, int]]:
        """Tier and bytes of every slot, and of every buffer without one, used so far."""
        for pool, nbytes in (
            (self._pool, self.boundary_nbytes),
            (self._kept_pool, self.projections_nbytes),
        ):
            for name in pool.names():
                self._slots.add(name)
                self._places[name] = (Tier.GPU, nbytes)
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

    def copy(self, name: str, kind: TaskKind, source: str, target: str) -> None:
        """Append a copy of a whole buffer."""
        cost = Cost(nbytes=self._nbytes[source])
        self.task(name, kind, op="copy", reads=[source], writes=[target], cost=cost)

    # -- weights and optimizer state -------------------------------------------------------------

    def resident(self, unit: str) -> bool:
        """Whether a unit's weights and optimizer state stay on the GPU."""
        return unit in self.plan.resident

    def hi(self, chunk: Chunk) -> str:
        """Upper halves of a chunk's master: its BF16 weights, 2 bytes per element."""
        return self._owned(chunk, "hi", 2, Tier.PINNED, Role.WEIGHT)

    def state(self, chunk: Chunk) -> str:
        """Lower halves and moments of a chunk, 10 bytes per element."""
        return self._owned(chunk, "state", STATE_NBYTES, Tier.CPU, Role.OPTIMIZER)

    def _owned(self, chunk: Chunk, kind: str, size: int, tier: Tier, role: Role) -> str:
        return self.buffer(
            f"{kind}.{chunk.unit}.{chunk.label}",
            size * chunk.numel,
            Tier.GPU if self.resident(chunk.unit) else tier,
            role,
            slot=f"{kind}.{chunk.unit}",
            offset=size * chunk.begin,
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
            self.copy(f"h2d.{name}", TaskKind.H2D, self.hi(chunk), weight)
            return weight
        halves = self.buffer(
            f"halves.{name}", 4 * chunk.numel, Tier.GPU, Role.WEIGHT, slot="halves"
        )
        self.task(
            f"h2d.{name}",
            TaskKind.H2D,
            op="upload_halves",
            reads=[self.hi(chunk), self.state(chunk)],
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
        """RoPE's cosines and sines, FP32 [2, seq_len, head_dim], and attention masks; made before step 1."""
        seq_len = self.plan.seq_len
        nbytes = 8 * seq_len * self.spec.head_dim
        names = [self.buffer("rope", nbytes, Tier.GPU, Role.CONSTANT, carried=True)]
        for window in self.spec.windows:
            if window < seq_len:
                mask = f"mask.{window}"
                square = seq_len * seq_len
                names.append(self.buffer(mask, square, Tier.GPU, Role.CONSTANT, carried=True))
        return names

    # -- boundaries ------------------------------------------------------------------------------

    def boundary(self, unit: str, m: int, suffix: str = "") -> str:
        """A new boundary on a slot of the pool, entered in `boundaries`; `release` gives it back."""
        slot = self._pool.acquire()
        name = f"x.{unit}.m{m}{suffix}"
        buffer = self.buffer(name, self.boundary_nbytes, Tier.GPU, Role.ACTIVATION, slot=slot)
        self._pool_slot[buffer] = (self._pool, slot)
        self.boundaries[unit, m] = buffer
        return buffer

    def boundary_gradient(self, m: int) -> None:
        """The gradient of a micro-batch's boundary, entered in `boundaries` as ``dx``.

        Those of a resident embedding lie one after another, as its update reads them all.
        """
        if not self.resident("embed"):
            self.boundary("dx", m)
            return
        nbytes = self.boundary_nbytes
        self.boundaries["dx", m] = self.buffer(
            f"x.dx.m{m}", nbytes, Tier.GPU, Role.GRADIENT, slot="dx", offset=m * nbytes
        )

    def release(self, buffer: str) -> None:
        """The last access to a boundary or to kept projections has been written down."""
        if buffer in self._pool_slot:
            pool, slot = self._pool_slot[buffer]
            pool.release(slot)

    def host_boundary(self, unit: str, m: int) -> str:
        """Place of a layer's input in pinned memory."""
        return self._host_boundary(f"xh.{unit}.m{m}", unit, m)

    def host_boundary_gradient(self, unit: str, m: int) -> str:
        """Gradient of that input; takes its place."""
        return self._host_boundary(f"dxh.{unit}.m{m}", unit, m)

    def _host_boundary(self, name: str, unit: str, m: int) -> str:
        nbytes = self.boundary_nbytes
        return self.buffer(
            name, nbytes, Tier.PINNED, Role.ACTIVATION, slot=f"xh.{unit}", offset=m * nbytes
        )

    def offload_boundary(self, unit: str, m: int, boundary: str) -> None:
        """Bring a boundary down, to wait for backward in pinned memory."""
        self.copy(f"d2h.x.{unit}.m{m}", TaskKind.D2H, boundary, self.host_boundary(unit, m))

    def reload_boundary(self, unit: str, m: int) -> None:
        """Bring an offloaded boundary up again for backward."""
        boundary = self.boundary(unit, m, ".bwd")
        self.copy(f"h2d.x.{unit}.m{m}.bwd", TaskKind.H2D, self.host_boundary(unit, m), boundary)

    # -- projections kept from forward to backward -----------------------------------------------

    @property
    def projections_nbytes(self) -> int:
        """Bytes of one micro-batch's gate and up projections [micro_tokens, 2·intermediate]."""
        return 2 * self.plan.micro_tokens * self.spec.intermediate * self.plan.compute.nbytes

    def keep_projections(self, unit: str, m: int, suffix: str = "") -> str:
        """A place on the GPU for a layer's projections, entered in `projections`."""
        slot = self._kept_pool.acquire()
        buffer = self.buffer(
            f"kept.{unit}.m{m}{suffix}",
            self.projections_nbytes,
            Tier.GPU,
            Role.ACTIVATION,
            slot=slot,
        )
        self._pool_slot[buffer] = (self._kept_pool, slot)
        self.projections[unit, m] = buffer
        return buffer

    def spill_projections(self, unit: str, m: int) -> None:
        """Bring projections down, to wait for backward in pinned memory."""
        kept = self.projections[unit, m]
        self.copy(f"d2h.kept.{unit}.m{m}", TaskKind.D2H, kept, self._host_projections(unit, m))
        self.release(kept)

    def reload_projections(self, unit: str, m: int) -> None:
        """Bring spilled projections up again for backward."""
        kept = self.keep_projections(unit, m, ".bwd")
        host = self._host_projections(unit, m)
        self.copy(f"h2d.kept.{unit}.m{m}.bwd", TaskKind.H2D, host, kept)

    def _host_projections(self, unit: str, m: int) -> str:
        nbytes = self.projections_nbytes
        return self.buffer(
            f"kh.{unit}.m{m}",
            nbytes,
            Tier.PINNED,
            Role.ACTIVATION,
            slot=f"kh.{unit}",
            offset=m * nbytes,
        )

    # -- gradients -------------------------------------------------------------------------------

    def accumulate(self, unit: UnitSpec, slot: str) -> list[str]:
        """Gradient accumulators of a unit's chunks."""
        return self._accumulators(self.chunks[unit.name], slot, self.plan.layer_accumulator)

    def accumulate_chunks(self, chunks: Sequence[Chunk], slot: str) -> list[str]:
        """Gradient accumulators of chunks of the output matrix."""
        return self._accumulators(chunks, slot, self.plan.head_accumulator)

    def _accumulators(self, chunks: Sequence[Chunk], slot: str, size: int) -> list[str]:
        return [
            self.buffer(
                f"acc.{chunk.unit}.{chunk.label}",
                size * chunk.numel,
                Tier.GPU,
                Role.GRADIENT,
                slot=slot,
                offset=size * (chunk.begin - chunks[0].begin),
            )
            for chunk in chunks
        ]

    def finish_gradients(
        self, chunks: Sequence[Chunk], accumulators: Sequence[str], targets: Sequence[str]
    ) -> None:
        """Round finished gradients and append their norms, in one task of the compute lane."""
        numel = sum(chunk.numel for chunk in chunks)
        self.task(
            f"finish.{chunks[0].unit}.{chunks[0].label}",
            TaskKind.COMPUTE,
            reads=accumulators,
            writes=targets,
            cost=Cost(nbytes=6 * numel),
        )

    def stage_gradients(
        self, chunks: Sequence[Chunk], accumulators: Sequence[str]
    ) -> Iterator[tuple[Chunk, str]]:
        """Finish gradients into staging slots, as many at once as there are: chunk, staged buffer."""
        group = self.plan.staging_slots
        for first in range(0, len(chunks), group):
            part = slice(first, first + group)
            staged = [self._staged_gradient(chunk) for chunk in chunks[part]]
            self.finish_gradients(chunks[part], accumulators[part], staged)
            yield from zip(chunks[part], staged, strict=True)

    def download_gradient(self, chunk: Chunk, staged: str, host: str = "") -> str:
        """Bring a staged gradient down, into a parking slot or ``host``; returns that."""
        host = host or self._host_gradient(chunk)
        self.copy(f"d2h.{chunk.unit}.{chunk.label}", TaskKind.D2H, staged, host)
        return host

    def _staged_gradient(self, chunk: Chunk) -> str:
        slot = f"g.{self._staged % self.plan.staging_slots}"
        self._staged += 1
        name, nbytes = f"g.{chunk.unit}.{chunk.label}", self._travelling_nbytes(chunk)
        return self.buffer(name, nbytes, Tier.GPU, Role.GRADIENT, slot=slot)

    def _host_gradient(self, chunk: Chunk) -> str:
        position = self._downloaded
        self._downloaded += 1
        slots = self.plan.gradient_slot
        slot = f"gh.{slots[position]}" if slots else ""
        name, nbytes = f"gh.{chunk.unit}.{chunk.label}", self._travelling_nbytes(chunk)
        return self.buffer(name, nbytes, Tier.PINNED, Role.GRADIENT, slot=slot)

    def parked_gradient(self, chunk: Chunk) -> str:
        """A tied matrix's gradient from the output side, until the look-up's side is known."""
        name = f"parked.{chunk.unit}.{chunk.label}"
        if not self.resident(chunk.unit):
            return self.buffer(name, self._travelling_nbytes(chunk), Tier.PINNED, Role.GRADIENT)
        size = self.plan.compute.nbytes  # chunks touch: the GPU updates them all at once
        return self.buffer(
            name,
            size * chunk.numel,
            Tier.GPU,
            Role.GRADIENT,
            slot="parked",
            offset=size * chunk.begin,
        )

    def _travelling_nbytes(self, chunk: Chunk) -> int:
        return self.plan.compute.nbytes * chunk.numel + CHECK_NBYTES

    # -- inputs and the loss --------------------------------------------------------------------------------

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

    def softmax_stats(self, m: int) -> str:
        """Running maximum, sum and target logit of each token, FP32 [3, micro_tokens]."""
        nbytes = 12 * self.plan.micro_tokens
        return self.buffer(f"softmax.m{m}", nbytes, Tier.GPU, Role.ACTIVATION)

    def norm_output_gradient(self, m: int) -> str:
        """Gradient of the final norm's output, FP32 [micro_tokens, hidden]."""
        nbytes = 4 * self.plan.micro_tokens * self.spec.hidden
        return self.buffer(f"dxn.m{m}", nbytes, Tier.GPU, Role.ACTIVATION)
