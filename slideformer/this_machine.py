"""What planning is told of the machine that it runs on: its device, its speed, its free memory."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from slideformer.config import EngineConfig, format_size
from slideformer.devices import find_device
from slideformer.graph.errors import DeviceError
from slideformer.graph.plan import Budgets
from slideformer.graph.profile import MachineProfile
from slideformer.memory.gpu_io import direct_storage
from slideformer.memory.limits import available_host_memory, free_nvme, host_memory
from slideformer.profiles import announce, cached_machine
from slideformer.runtime.nvme_files import stale_nbytes

logger = logging.getLogger(__name__)


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


def budgets_for(config: EngineConfig, device: torch.device, *, here: bool = False) -> Budgets:
    """The budgets asked for; otherwise what the machine has left.

    With ``here``, for a run on this machine, no more than it has at all, and a warning says so.
    """
    host = config.cpu_memory or available_host_memory()
    gpu = config.gpu_memory
    if here:
        host = _at_most("cpu_memory", host, host_memory())
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        if gpu is None:
            gpu = free + torch.cuda.memory_reserved(device)
        elif here:
            gpu = _at_most("gpu_memory", gpu, total)
    nvme = config.nvme_memory or free_nvme(config.nvme, stale_nbytes)
    return Budgets(gpu, host, nvme, config.nvme_write_limit)


def threads_for(config: EngineConfig) -> int:
    """Threads of the CPU update: those asked for, but one a core at most, and a warning says so."""
    asked, cores = config.threads or default_threads(), usable_cores()
    if asked > cores:
        logger.warning(
            "threads is %d, but this process may use %d cores; updates take %d threads",
            asked, cores, cores,
        )  # fmt: skip
    return min(asked, cores)


def default_threads() -> int:
    """Threads of the CPU update: all cores but two, which launch and decide."""
    return max(1, usable_cores() - 2)


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def _at_most(name: str, asked: int, there: int) -> int:
    if asked > there:
        logger.warning(
            "%s is %s, but there are %s here; the plan is made for these",
            name, format_size(asked), format_size(there),
        )  # fmt: skip
    return min(asked, there)
