"""GPU memory and the NVMe store: through KvikIO on a GPU, through a stand-in elsewhere."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Self

import pytest
import torch

from slideformer.graph.errors import DeviceError, StoreError
from slideformer.memory.extents import lay_out_extents
from slideformer.memory.gpu_io import direct_storage
from slideformer.runtime.nvme import NvmeStore, open_store

SIZE = 12 << 20


class GpuBytes:
    """Bytes that only KvikIO may touch, as those on a GPU."""

    def __init__(self, content: bytes | memoryview) -> None:
        self.memory = content if isinstance(content, memoryview) else memoryview(bytearray(content))
        self.__cuda_array_interface__: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self.memory)

    def __getitem__(self, part: slice) -> Self:
        return type(self)(self.memory[part])


class StandIn:
    """`kvikio.CuFile` for `GpuBytes`; ``short`` bytes are left out of each transfer."""

    short = 0

    def __init__(self, path: Path, flags: str) -> None:
        assert flags == "r+"
        self._descriptor = os.open(path, os.O_RDWR)

    def pread(self, buffer: GpuBytes, *, file_offset: int) -> SimpleNamespace:
        count = os.preadv(self._descriptor, [buffer.memory], file_offset) - self.short
        return SimpleNamespace(get=lambda: count)

    def pwrite(self, buffer: GpuBytes, *, file_offset: int) -> SimpleNamespace:
        count = os.pwritev(self._descriptor, [buffer.memory], file_offset) - self.short
        return SimpleNamespace(get=lambda: count)

    def close(self) -> None:
        os.close(self._descriptor)


@pytest.fixture
def kvikio(monkeypatch: pytest.MonkeyPatch) -> type[StandIn]:
    """A stand-in for KvikIO."""
    driver = ModuleType("kvikio.cufile_driver")
    module = ModuleType("kvikio")
    vars(driver)["get"] = {"is_gds_available": False}.get
    vars(module).update(CuFile=StandIn, cufile_driver=driver)
    monkeypatch.setitem(sys.modules, "kvikio", module)
    monkeypatch.setitem(sys.modules, "kvikio.cufile_driver", driver)
    return StandIn


def store_in(folder: Path) -> NvmeStore:
    """A store of one extent, of several pieces."""
    return open_store([folder], lay_out_extents({"e": SIZE}))


def test_gpu_memory_goes_through_kvikio_in_a_mode_that_is_named(
    tmp_path: Path, kvikio: type[StandIn], caplog: pytest.LogCaptureFixture
) -> None:
    extent = lay_out_extents({"e": SIZE})["e"]
    content = os.urandom(SIZE)
    store = store_in(tmp_path)
    with caplog.at_level(logging.INFO):
        store.write(extent, GpuBytes(content)).result()
    assert "by KvikIO's POSIX mode" in caplog.text
    target = GpuBytes(bytes(SIZE))
    store.read(extent, target).result()
    assert target.memory == content
    store.close()


def test_a_short_transfer_of_gpu_memory_names_extent_and_path(
    tmp_path: Path, kvikio: type[StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kvikio, "short", 4096)
    store = store_in(tmp_path)
    (path,) = store.paths
    transfer = store.write(lay_out_extents({"e": SIZE})["e"], GpuBytes(bytes(SIZE)))
    with pytest.raises(StoreError, match=rf"{path}: cannot write .* extent e .* bytes were moved"):
        transfer.result()
    store.close()


@pytest.mark.parametrize("available", [True, False])
def test_gpudirect_storage_is_what_kvikio_finds(
    kvikio: type[StandIn], monkeypatch: pytest.MonkeyPatch, available: bool
) -> None:
    driver = sys.modules["kvikio.cufile_driver"]
    monkeypatch.setattr(driver, "get", {"is_gds_available": available}.get)
    assert direct_storage() == available


def test_without_kvikio_there_is_no_gpudirect_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kvikio", None)
    monkeypatch.setitem(sys.modules, "kvikio.cufile_driver", None)
    assert not direct_storage()


def test_without_kvikio_the_message_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "kvikio", None)
    store = store_in(tmp_path)
    with pytest.raises(DeviceError, match=r"pip install 'slideformer\[nvme\]'"):
        store.read(lay_out_extents({"e": SIZE})["e"], GpuBytes(bytes(SIZE)))
    store.close()


@pytest.mark.gpu
def test_gpu_memory_comes_back_from_nvme(tmp_path: Path) -> None:
    pytest.importorskip("kvikio")
    extent = lay_out_extents({"e": SIZE})["e"]
    source = torch.randint(0, 256, (SIZE,), dtype=torch.uint8, device="cuda")
    target = torch.zeros_like(source)
    torch.cuda.synchronize()
    store = store_in(tmp_path)
    store.write(extent, source).result()
    store.read(extent, target).result()
    assert torch.equal(source, target)
    host = torch.empty(SIZE, dtype=torch.uint8, pin_memory=True)
    store.read(extent, host.numpy().data).result()
    assert torch.equal(host, source.cpu()), "the host reads what the GPU wrote"
    store.close()
