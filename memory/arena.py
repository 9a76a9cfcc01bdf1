"""The memory itself: one exact-size arena per tier, allocated once, and views of buffers in it.

Host arenas use huge pages, are touched by many threads at once and, where the GPU copies from them,
registered with CUDA in pieces: PyTorch's pinned allocator rounds up to powers of two and takes
several times as long.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Mapping, Sequence

import torch

from slideformer.graph.buffers import Buffer, Tier
from slideformer.graph.errors import BudgetError, DeviceError
from slideformer.memory.layout import Layout

_REGISTER_PIECE = 4 << 30
_HUGE_PAGE = 2 << 20


class HostArena:
    """``nbytes`` bytes of zeroed host memory as one uint8 tensor.

    With ``cuts``, ascending offsets that no copy crosses, it is page-locked.
    """

    def __init__(self, nbytes: int, cuts: Sequence[int] | None = None) -> None:
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
        self._registered: list[int] = []
        if cuts is not None:
            self._register(nbytes, cuts)

    def _register(self, nbytes: int, cuts: Sequence[int]) -> None:
        """Lock the pages in pieces that end at cuts: CUDA copies only within one piece."""
        runtime = torch.cuda.cudart()
        base = self.tensor.data_ptr()
        for offset, end in _pieces(nbytes, cuts):
            size = end - offset
            code = runtime.cudaHostRegister(base + offset, size, 0)
            if int(code) != 0:
                self.close()
                raise DeviceError(
                    f"CUDA refuses to page-lock host memory: {offset:,} of {nbytes:,} bytes are "
                    f"locked, the next {size:,} are not (error {int(code)}); check `ulimit -l` and "
                    "the container's memory limit"
                )
            self._registered.append(base + offset)

    def close(self) -> None:
        """Unlock the pages; the memory goes with the last view of it."""
        for pointer in self._registered:
            torch.cuda.cudart().cudaHostUnregister(pointer)
        self._registered.clear()


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
    """The arenas of a run; resolves buffers to views. `close` gives them back."""

    def __init__(
        self, layout: Layout, places: Mapping[str, tuple[Tier, int]], device: torch.device
    ) -> None:
        self._layout = layout
        self._places = places
        self._host: list[HostArena] = []
        self._tensors: dict[Tier, torch.Tensor] = {}
        cuda = device.type == "cuda"
        for tier, nbytes in layout.sizes.items():
            if tier is Tier.GPU and cuda:
                # Temporaries come and go in many sizes; growing segments in place instead of
                # keeping one per size holds reserved memory near what is allocated.
                os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
                self._tensors[tier] = torch.empty(nbytes, dtype=torch.uint8, device=device)
            else:
                starts = [layout.offsets[name] for name, (t, _) in places.items() if t is tier]
                arena = HostArena(nbytes, sorted(starts) if cuda and tier is Tier.PINNED else None)
                self._host.append(arena)
                self._tensors[tier] = arena.tensor

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
        for arena in self._host:
            arena.close()
        self._host.clear()
        self._tensors.clear()
