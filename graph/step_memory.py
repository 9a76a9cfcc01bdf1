"""The slots and buffers of a step, and the copies between them.

Slots (the same names and sizes in every graph of a run, so that graphs can follow one another):

    w.k, w.head, w.norm   GPU      weights of layers, of a whole output matrix, of the final norm
    acc.0, acc.head, …    GPU      gradient accumulators
    g.k                   GPU      finished gradient chunks on their way down
    x.k                   GPU      boundaries: a layer's input, or its gradient, of one micro-batch
    hi.U, state.U         pinned, cpu   master's upper halves; lower halves with both moments
    gh.k, parked.c        pinned   gradient chunks waiting for their update
    xh.U                  pinned   offloaded boundaries
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

from slideformer.graph.buffers import Role, Tier
from slideformer.graph.builder import GraphBuilder
from slideformer.graph.chunks import Chunk, chunk_unit
from slideformer.graph.graph import TaskGraph
from slideformer.graph.model import ModelSpec, UnitSpec
from slideformer.graph.placing import SlotPool
from slideformer.graph.plan import Compute, MemoryPlan
from slideformer.graph.tasks import Cost, TaskKind

STATE_NBYTES = 10
"""Bytes per element beside the master's upper half: its lower half (2) and two moments (4 + 4)."""

CHECK_NBYTES = 256
"""Bytes behind each gradient chunk for its sum of squares (4 used; keeps chunks aligned)."""


class StepMemory:
    """Declares buffers on first use and appends copy tasks; `build` adds the slots."""

    def __init__(self, spec: ModelSpec, plan: MemoryPlan, name: str) -> None:
        self._spec = spec
        self._plan = plan
        self._builder = GraphBuilder(name)
        self._nbytes: dict[str, int] = {}
        self._slots: set[str] = set()
        self._places: dict[str, tuple[Tier, int]] = {}
        self._boundaries = SlotPool("x", plan.boundary_slots)
        self._boundary_slot: dict[str, str] = {}
        self._staged = 0
        self._downloaded = 0
        self.norm_parts: list[str] = []
        self.task = self._builder.task

    @cached_property
    def chunks(self) -> Mapping[str, tuple[Chunk, ...]]:
        """The chunks of every unit."""
        spec, plan = self._spec, self._plan
        return {
            unit.name: chunk_unit(spec, unit, plan.chunk_numel, plan.vocab_chunks)
            for unit in spec.units
        }

    @cached_property
    def boundary_nbytes(self) -> int:
        """Bytes of one micro-batch's boundary [micro_rows, seq_len, hidden]."""
        return self._plan.micro_tokens * self._spec.hidden * self._plan.compute.nbytes

    def build(self) -> TaskGraph:
        """Declare all slots and finish the graph."""
        places = self.places()
        for name in places:
            if name in self._slots:
                self._builder.slot(name, *places[name])
        return self._builder.build()

    def places(self) -> dict[str, tuple[Tier, int]]:
        """Tier and bytes of every slot, and of every buffer without one, used so far."""
        for name in self._boundaries.names():
            self._slots.add(name)
            self._places[name] = (Tier.GPU, self.boundary_nbytes)
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

    def hi(self, chunk: Chunk) -> str:
        """Upper halves of a chunk's master: its BF16 weights, 2 bytes per element."""
        return self.buffer(
            f"hi.{chunk.unit}.{chunk.label}",
            2 * chunk.numel,
            Tier.PINNED,
            Role.WEIGHT,
            slot=f"hi.{chunk.unit}",
            offset=2 * chunk.begin,
            carried=True,
        )

    def state(self, chunk: Chunk) -> str:
        """Lower halves and moments of a chunk, 10 bytes per element."""
        return self.buffer(
            f"state.{chunk.unit}.{chunk.label}",
            STATE_NBYTES * chunk.numel,
            Tier.CPU,
            Role.OPTIMIZER,
            slot=f"state.{chunk.unit}",
            offset=STATE_NBYTES * chunk.begin,
            carried=True,
        )

    def master(self, unit: UnitSpec) -> list[str]:
        """Upper halves and state of all chunks of a unit."""
        return [name for c in self.chunks[unit.name] for name in (self.hi(c), self.state(c))]

    def load_chunks(self, chunks: Sequence[Chunk], slot: str, purpose: str) -> list[str]:
        """Bring chunks up into a slot, which starts at the first one. Returns their buffers."""
        return [self._load(chunk, slot, purpose, chunks[0].begin) for chunk in chunks]

    def _load(self, chunk: Chunk, slot: str, purpose: str, origin: int) -> str:
        size = self._plan.compute.nbytes
        name = f"{chunk.unit}.{purpose}.{chunk.label}"
        weight = self.buffer(
            f"w.{name}",
            size * chunk.numel,
            Tier.GPU,
            Role.WEIGHT,
            slot=slot,
            offset=size * (chunk.begin - origin),
        )
        if self._plan.compute is Compute.BF16:
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
        seq_len = self._plan.seq_len
        nbytes = 8 * seq_len * self._spec.head_dim
        names = [self.buffer("rope", nbytes, Tier.GPU, Role.CONSTANT, carried=True)]
        for window in self._spec.windows:
            if window < seq_len:
                mask = f"mask.{window}"
                square = seq_len * seq_len
                names.append(self.buffer(mask, square, Tier.GPU, Role.CONSTANT, carried=True))
        return names

    # -- boundaries ------------------------------------------------------------------------------

    def boundary(self, unit: str, m: int, suffix: str = "") -> str:
        """A new boundary buffer on a slot of the pool; `release` gives the slot back."""
        slot = self._boundaries.acquire()
        name = f"x.{unit}.m{m}{suffix}"
        buffer = self.buffer(name, self.boundary_nbytes, Tier.GPU, Role.ACTIVATION, slot=slot)
        self._boundary_slot[buffer] = slot
        return buffer

    def release(self, boundary: str) -> None:
        """The boundary's last access has been written down."""
        self._boundaries.release(self._boundary_slot[boundary])

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

    def reload_boundary(self, unit: str, m: int) -> str:
        """Bring an offloaded boundary up again for backward."""
        boundary = self.boundary(unit, m, ".bwd")
        self.copy(f"h2d.x.{unit}.m{m}.bwd", TaskKind.H2D, self.host_boundary(unit, m), boundary)
        return boundary

    # -- gradients -------------------------------------------------------------------------------

    def accumulate(self, unit: UnitSpec, slot: str) -> list[str]:
        """Gradient accumulators of a unit's chunks."""
        return self._accumulators(self.chunks[unit.name], slot, self._plan.layer_accumulator)

    def accumulate_chunks(self, chunks: Sequence[Chunk], slot: str) -> list[str]:
        """Gradient accumulators of chunks of the output matrix."""
        return self._accumulators(chunks, slot, self._plan.head_accumulator)

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

    def download_gradient(self, chunk: Chunk, accumulator: str, *, parked: bool) -> str:
        """Round a finished gradient, add up its squares and bring both down. Returns the host buffer."""
        name = f"{chunk.unit}.{chunk.label}"
        nbytes = self._plan.compute.nbytes * chunk.numel + CHECK_NBYTES
        slot = f"g.{self._staged % self._plan.staging_slots}"
        self._staged += 1
        staged = self.buffer(f"g.{name}", nbytes, Tier.GPU, Role.GRADIENT, slot=slot)
        self.task(
            f"finish.{name}",
            TaskKind.COMPUTE,
            reads=[accumulator],
            writes=[staged],
            cost=Cost(nbytes=6 * chunk.numel),
            numel=chunk.numel,
        )
        host = self.parked_gradient(chunk) if parked else self._host_gradient(name, nbytes)
        self.copy(f"d2h.{name}", TaskKind.D2H, staged, host)
        return host

    def _host_gradient(self, name: str, nbytes: int) -> str:
        position = self._downloaded
        self._downloaded += 1
        slots = self._plan.gradient_slot
        slot = f"gh.{slots[position]}" if slots else ""
        return self.buffer(f"gh.{name}", nbytes, Tier.PINNED, Role.GRADIENT, slot=slot)

    def parked_gradient(self, chunk: Chunk) -> str:
        """The tied matrix's gradient from the output side, until the embedding's rows are known."""
        nbytes = self._plan.compute.nbytes * chunk.numel + CHECK_NBYTES
        return self.buffer(
            f"parked.{chunk.unit}.{chunk.label}", nbytes, Tier.PINNED, Role.GRADIENT
        )

    def norm_part(self, name: str) -> str:
        """Eight bytes for one update's sum of squared gradients (FP64)."""
        offset = 8 * len(self.norm_parts)
        part = self.buffer(
            f"sq.{name}", 8, Tier.CPU, Role.RESULT, slot="squares", offset=offset
        )
        self.norm_parts.append(part)
        return part

    # -- the loss --------------------------------------------------------------------------------

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
        nbytes = 12 * self._plan.micro_tokens
        return self.buffer(f"softmax.m{m}", nbytes, Tier.GPU, Role.ACTIVATION)

    def norm_output_gradient(self, m: int) -> str:
        """Gradient of the final norm's output, FP32 [micro_tokens, hidden]."""
        nbytes = 4 * self._plan.micro_tokens * self._spec.hidden
        return self.buffer(f"dxn.m{m}", nbytes, Tier.GPU, Role.ACTIVATION)
