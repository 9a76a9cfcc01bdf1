"""What planning is told of the machine that it runs on: its device, its speed, its free memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from slideformer.config import EngineConfig
from slideformer.devices import find_device
from slideformer.graph.errors import DeviceError
from slideformer.graph.plan import Budgets
from slideformer.graph.profile import MachineProfile
from slideformer.memory.gpu_io import direct_storage
from slideformer.memory.limits import available_host_memory, free_nvme
from slideformer.profiles import announce, cached_machine
from slideformer.runtime.nvme_files import stale_nbytes


def device_for(config: EngineConfig) -> torch.device:
    """The device that ``config`` asks for; raises `DeviceError` if it is not usable."""
    device = find_device(config.device)
    if device.type == "cuda" and config.compute == "bf16" and not torch.cuda.is_bf16_supported():
        name = torch.cuda.get_device_name()
        raise DeviceError(f"{name} cannot compute in BF16; use --compute fp32")
    return device


def profile_for(device: torch.device, nvme: Sequence[Path] = ()) -> MachineProfile:
    """What planning assumes of this machine: what was measured here, else a generic machine.

    Without a GPU there is no context beside the plan. With one, ``nvme`` being the folders in use,
    it says whether both exchange bytes by themselves.
    """
    known = cached_machine(device.type)
    if known is None:
        profile = MachineProfile()
    else:
        announce(known)
        profile = known.profile
    if device.type != "cuda":
        return replace(profile, gpu_overhead=0)
    return replace(profile, direct_storage=bool(nvme) and direct_storage())


def budgets_for(config: EngineConfig, device: torch.device) -> Budgets:
    """The budgets asked for; otherwise what the machine has left."""
    host = config.cpu_memory or available_host_memory()
    gpu = config.gpu_memory
    if gpu is None and device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        gpu = free + torch.cuda.memory_reserved(device)
    nvme = config.nvme_memory or free_nvme(config.nvme, stale_nbytes)
    return Budgets(gpu, host, nvme, config.nvme_write_limit)
