"""Measures this machine: every rate that predicting a step needs, on shapes of no particular model.

    machine = measure_machine(torch.device("cuda"), sizes_for(device), nvme=())

What is measured elsewhere by kind is put together here; ``profiles.py`` keeps the result.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from slideformer.graph.machines import Machine
from slideformer.graph.profile import MachineProfile
from slideformer.graph.tasks import Lane, ProductKind
from slideformer.measuring.gpu_overhead import gpu_overhead
from slideformer.measuring.lane_rates import (
    WALKED_BYTES,
    LaneSizes,
    gpu_copy_rate,
    host_copy_rate,
    measure_lanes,
)
from slideformer.measuring.nvme_rates import disk_rates
from slideformer.measuring.product_rates import ProductSizes, measure_products
from slideformer.measuring.update_rates import COPY_PIECES
from slideformer.memory.limits import available_host_memory
from slideformer.profiles import machine_key
from slideformer.this_machine import default_threads

_MOST_WALKED = 64 << 30
"""Bytes of host memory to update at most; touching them takes four seconds."""

LIBRARY_NBYTES = 160 << 20
"""Least bytes to keep free for workspaces of CUDA's libraries and what the allocator rounds up."""

_LEAST_GAP = 1e-6
"""Seconds below which a hand-over is not told from nothing."""


@dataclass(frozen=True, slots=True)
class ProfileSizes:
    """How much is measured: products, the other lanes, bytes within memory, bytes on NVMe."""

    products: ProductSizes
    lanes: LaneSizes
    memory_nbytes: int
    nvme_nbytes: int = 2 << 30
    nvme_threads: int = 4

    @property
    def parts(self) -> int:
        """Calls of ``done`` while everything but NVMe is measured."""
        products = self.products
        return 3 + len(products.sequences) + len(products.widths) + len(products.widths[:2])


def sizes_for(device: torch.device) -> ProfileSizes:
    """What takes two to three minutes on a large GPU, and about one where there is none."""
    room = available_host_memory()
    walked = min(_MOST_WALKED, room // 2) // WALKED_BYTES
    memory = min(256 << 20, room // 16)
    copied = min(256 << 20, room // (16 * COPY_PIECES))  # of what both ways pin, an eighth of it
    if device.type == "cuda":
        return ProfileSizes(
            ProductSizes(
                widths=(1536, 3584, 9216),
                tokens=(512, 2048, 4096, 16384, 32768),
                sequences=(512, 1024, 4096, 16384),
                vocab=65536,
                tiles=(512, 2048, 4096, 8192),
                longest=1.0,
                seconds=0.25,
            ),
            LaneSizes(walked, copied, width=3584, tokens=4096, seconds=3.0),
            memory,
        )
    return ProfileSizes(
        ProductSizes(
            widths=(256, 1024),
            tokens=(64, 256, 1024, 4096),
            sequences=(256, 1024),
            vocab=4096,
            tiles=(256, 1024),
            longest=0.5,
            seconds=0.1,
        ),
        LaneSizes(min(walked, 1 << 28), min(copied, 64 << 20), width=256, tokens=256, seconds=1.0),
        memory,
    )


def measure_machine(
    device: torch.device,
    sizes: ProfileSizes,
    nvme: Sequence[Path] = (),
    done: Callable[[str], None] = lambda _: None,
) -> Machine:
    """This machine's profile; ``done`` is called with what was measured last.

    The rates of NVMe folders add up, as files are striped over them. Without one NVMe keeps what a
    generic machine has. Raises `DeviceError`, and `ConfigError` for a folder that cannot be used.
    """
    cuda, threads = device.type == "cuda", default_threads()
    generic = MachineProfile()
    disks = [disk_rates(folder, sizes.nvme_nbytes, sizes.nvme_threads) for folder in nvme]
    read, write = (sum(disk[way] for disk in disks) for way in ("read", "write"))
    if nvme:
        done("NVMe")
    lanes = measure_lanes(device, sizes.lanes, threads)
    done("copies, updates and computing beside each other")
    host_copy = host_copy_rate(sizes.memory_nbytes)
    gpu_copy = gpu_copy_rate(device, sizes.memory_nbytes // 4) if cuda else host_copy
    done("memory")
    context, slack = gpu_overhead(device) if cuda else (0, 0)
    done("context")
    points = measure_products(device, sizes.products, done)
    shares = dict(lanes.shares)
    if nvme:
        half = sum(disk["both"] for disk in disks) / 2
        shares[Lane.NVME_READ] = min(1.0, half / read)
        shares[Lane.NVME_WRITE] = min(1.0, half / write)
    key = machine_key(device.type)
    profile = MachineProfile(
        name="this machine",
        h2d=lanes.h2d,
        d2h=lanes.d2h,
        flops=max(point.rate for point in points if point.kind is ProductKind.FORWARD),
        update=lanes.update,
        host_copy=host_copy,
        gpu_copy=gpu_copy,
        nvme_read=read or generic.nvme_read,
        nvme_write=write or generic.nvme_write,
        launch=max(lanes.launch, _LEAST_GAP),
        handover=max(lanes.handover, _LEAST_GAP),
        points=points,
        contention=shares,
        gpu_overhead=context + max(slack, LIBRARY_NBYTES) if cuda else generic.gpu_overhead,
    )
    total = torch.cuda.mem_get_info(device)[1] if cuda else available_host_memory()
    return Machine(
        title=f"{key['device']}, {key['cores']} cores (measured)",
        profile=profile,
        gpu_memory=total,
        sources=_sources(sizes, threads, bool(nvme))
        | {f"contention.{lane}": "measured: all at work together" for lane in shares},
        measured={
            **key,
            "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "context bytes": str(context),
            "allocator slack bytes": str(slack),
        },
    )


def _sources(sizes: ProfileSizes, threads: int, nvme: bool) -> dict[str, str]:
    lanes = sizes.lanes
    copies = f"measured: copies of {lanes.copy_nbytes:,} bytes"
    disk = f"measured: direct I/O on {sizes.nvme_nbytes:,} bytes"
    disk = disk if nvme else "assumed: not measured; give --nvme FOLDER"
    return {
        "h2d": copies,
        "d2h": copies,
        "flops": "measured: the fastest layer, forward",
        "update": f"measured: {lanes.update_numel:,} parameters, {threads} threads",
        "host_copy": f"measured: {sizes.memory_nbytes:,} bytes, read and written",
        "gpu_copy": "measured: AdamW on the GPU, bytes read and written",
        "nvme_read": disk,
        "nvme_write": disk,
        "launch": "measured: between layers",
        "handover": "measured: between CPU updates while all lanes work",
    }
