"""Arenas: exact, zeroed, and cut into views; page-locked pieces end where places do."""

from __future__ import annotations

import gc
import threading
import weakref
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slideformer.graph.buffers import Tier
from slideformer.graph.builder import GraphBuilder
from slideformer.graph.errors import BudgetError, DeviceError
from slideformer.memory import arena
from slideformer.memory.arena import Arenas, HostArena
from slideformer.memory.layout import lay_out, places

CPU = torch.device("cpu")


@pytest.mark.parametrize("nbytes", [0, 1, 4096, (2 << 20) + 5])
def test_a_host_arena_is_exact_and_zero(nbytes: int) -> None:
    memory = HostArena(nbytes)
    assert memory.tensor.shape == (nbytes,)
    assert memory.tensor.dtype is torch.uint8
    assert not memory.tensor.any()
    memory.tensor.fill_(7)
    memory.close()


def test_more_than_the_system_has_is_refused_with_its_size() -> None:
    with pytest.raises(BudgetError, match=r"refuses 1,125,899,906,842,624 bytes.*--cpu-memory"):
        HostArena(1 << 50)


def test_buffers_of_a_slot_share_its_bytes_and_no_others() -> None:
    builder = GraphBuilder()
    builder.slot("slot", Tier.GPU, 8)
    whole = builder.buffer("whole", 8, Tier.GPU, slot="slot")
    part = builder.buffer("part", 4, Tier.GPU, slot="slot", offset=4)
    alone = builder.buffer("alone", 4, Tier.GPU)
    graph = builder.build()
    wanted = places([graph])
    arenas = Arenas(lay_out(wanted), wanted, CPU)
    views = {name: arenas.view(graph.buffers[name]) for name in (whole, part, alone)}
    views[part].fill_(3)
    assert views[whole].tolist() == [0, 0, 0, 0, 3, 3, 3, 3]
    assert views[alone].tolist() == [0, 0, 0, 0]
    assert arenas.place("slot").data_ptr() == views[whole].data_ptr()
    arenas.close()


def test_the_memory_goes_with_the_last_view() -> None:
    memory = HostArena(1 << 20)
    mapped = weakref.ref(memory._map)
    view = memory.tensor[5:9]
    memory.close()
    del memory
    gc.collect()
    assert mapped() is not None, "a view still needs it"
    del view
    gc.collect()
    assert mapped() is None


class FakeCuda:
    """Page-locks as CUDA does: when it is allowed to, and up to a limit."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.locked: dict[int, int] = {}
        self.allowed = threading.Event()

    def cudaHostRegister(self, pointer: int, nbytes: int, flags: int) -> int:
        assert self.allowed.wait(10)
        if sum(self.locked.values()) + nbytes > self.limit:
            return 2
        self.locked[pointer] = nbytes
        return 0

    def cudaHostUnregister(self, pointer: int) -> int:
        del self.locked[pointer]
        return 0


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda(limit=100)
    monkeypatch.setattr(arena, "_REGISTER_PIECE", 40)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: fake)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    return fake


def test_memory_is_filled_while_it_is_being_locked(fake_cuda: FakeCuda) -> None:
    memory = HostArena(90)
    memory.lock([30, 60], CPU)
    memory.tensor.fill_(7)
    fake_cuda.allowed.set()
    memory.ready()
    base = memory.tensor.data_ptr()
    assert fake_cuda.locked == {base: 30, base + 30: 30, base + 60: 30}
    memory.close()
    assert fake_cuda.locked == {}


def test_memory_that_cannot_all_be_locked_is_refused_and_none_stays_locked(
    fake_cuda: FakeCuda,
) -> None:
    memory = HostArena(120)
    memory.lock([40, 80], CPU)
    fake_cuda.allowed.set()
    with pytest.raises(DeviceError, match=r"80 of 120 bytes are locked, the next 40 are not"):
        memory.ready()
    assert len(fake_cuda.locked) == 2
    memory.close()
    assert fake_cuda.locked == {}


@given(
    st.lists(st.integers(0, 60), max_size=12).map(sorted),
    st.integers(0, 60),
    st.integers(1, 20),
)
def test_pieces_end_at_cuts_and_are_as_long_as_fits(
    cuts: list[int], beyond: int, piece: int
) -> None:
    nbytes = (cuts[-1] if cuts else 0) + beyond
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arena, "_REGISTER_PIECE", piece)
        pieces = list(arena._pieces(nbytes, cuts))
    assert [start for start, _ in pieces] == [0, *(end for _, end in pieces)][: len(pieces)]
    assert (pieces[-1][1] if pieces else 0) == nbytes
    ends = {*cuts, nbytes}
    for start, end in pieces:
        assert start < end
        assert end in ends
        between = [cut for cut in ends if start < cut < end]
        assert end - start <= piece or not between, "longer only where no cut allows less"
    for (_, end), (_, following) in pairwise(pieces):
        start = max(s for s, e in pieces if e == end)
        first_cut = min(cut for cut in ends if cut > end)
        assert first_cut - start > piece, "the next cut would have been too far"
        assert following > end
