"""The memory itself: one exact-size arena per tier, allocated once, and views of buffers in it.

Host arenas use huge pages, are touched by many threads at once and, where the GPU copies from them,
registered with CUDA in pieces: PyTorch's pinned allocator rounds up to powers of two and takes
several times as long.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch

from slideformer.graph.buffers import Buffer, Tier
from slideformer.graph.errors import BudgetError, DeviceError
from slideformer.memory.layout import Layout

_REGISTER_PIECE = 4 << 30
_HUGE_PAGE = 2 << 20


class HostArena:
    """``nbytes`` bytes of zeroed host memory as one uint8 tensor."""

    def __init__(self, nbytes: int) -> None:
        try:
            self._map = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise BudgetError(
                f"the system refuses {nbytes:,} bytes of host memory ({error}); "
                "lower --cpu-memory or free memory"
            ) from error
        if nbytes >= _HUGE_PAGE:
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self.tensor = torch.frombuffer(self._map, dtype=torch.uint8)[:nbytes]
        self.tensor.zero_()  # touches every page, on all of torch's threads
        self._locked: list[int] = []
        self._locking: Future[None] | None = None

    def lock(self, cuts: Sequence[int], device: torch.device) -> None:
        """Begin to page-lock it for copies; whoever fills it need not wait.

        No copy may cross one of ``cuts``, ascending offsets.
        """
        threads = ThreadPoolExecutor(1, "slideformer-lock")
        self._locking = threads.submit(self._lock, cuts, device)
        threads.shutdown(wait=False)

    def ready(self) -> None:
        """Wait until all is locked; raises `DeviceError` if CUDA refuses."""
        if self._locking is not None:
            self._locking.result()

    def _lock(self, cuts: Sequence[int], device: torch.device) -> None:
        """In pieces that end at cuts: CUDA copies only within one piece."""
        torch.cuda.set_device(device)
        base, nbytes = self.tensor.data_ptr(), len(self.tensor)
        for offset, end in _pieces(nbytes, cuts):
            size = end - offset
            code = torch.cuda.cudart().cudaHostRegister(base + offset, size, 0)
            if int(code) != 0:
                raise DeviceError(
                    f"CUDA refuses to page-lock host memory: {offset:,} of {nbytes:,} bytes are "
                    f"locked, the next {size:,} are not (error {int(code)}); check `ulimit -l` and "
                    "the container's memory limit"
                )
            self._locked.append(base + offset)

    def close(self) -> None:
        """Unlock the pages; the memory goes with the last view of it."""
        if self._locking is not None:
            wait([self._locking])
        for pointer in self._locked:
            torch.cuda.cudart().cudaHostUnregister(pointer)
        self._locked.clear()


def _pieces(nbytes: int, cuts: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Tile ``[0, nbytes)`` by ranges that end at cuts and are as long as fits into 4 GiB."""
    start, end = 0, 0
    for cut in [*cuts, nbytes]:
        if cut - start > _REGISTER_PIECE and end > start:
            yield start, end
            start = end
        end = cut
    if end > start:
        yield start, end


class Arenas:
    """The arenas of a run; resolves buffers to views.

    Pinned memory is still being locked: wait for `ready` before the first copy. `close` gives all
    memory back.
    """

    def __init__(
        self, layout: Layout, places: Mapping[str, tuple[Tier, int]], device: torch.device
    ) -> None:
        self._layout = layout
        self._places = places
        self._host: dict[Tier, HostArena] = {}
        self._tensors: dict[Tier, torch.Tensor] = {}
        cuda = device.type == "cuda"
        for tier, nbytes in layout.sizes.items():
            if tier is Tier.GPU and cuda:
                self._tensors[tier] = torch.empty(nbytes, dtype=torch.uint8, device=device)
            else:
                self._host[tier] = HostArena(nbytes)
                self._tensors[tier] = self._host[tier].tensor
        if cuda and Tier.PINNED in self._host:  # last: what fails above has nothing to unlock
            pinned = (layout.offsets[name] for name, (t, _) in places.items() if t is Tier.PINNED)
            self._host[Tier.PINNED].lock(sorted(pinned), device)

    def ready(self) -> None:
        """Wait until pinned memory is locked; raises `DeviceError` if CUDA refuses."""
        for arena in self._host.values():
            arena.ready()

    def place(self, name: str) -> torch.Tensor:
        """All bytes of a slot or of a buffer without one, uint8 [nbytes]."""
        tier, nbytes = self._places[name]
        offset = self._layout.offsets[name]
        return self._tensors[tier][offset : offset + nbytes]

    def view(self, buffer: Buffer) -> torch.Tensor:
        """The bytes of a buffer, uint8 [nbytes]."""
        return self.place(buffer.place)[buffer.offset : buffer.stop]

    def close(self) -> None:
        """Unlock pinned memory and let go of all; nothing may be in flight."""
        for arena in self._host.values():
            arena.close()
        self._host.clear()
        self._tensors.clear()
