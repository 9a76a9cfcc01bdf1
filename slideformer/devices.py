"""Where a run computes: PyTorch's device, and the runtime's lanes on it."""

from __future__ import annotations

import torch

from slideformer.graph.errors import ConfigError, DeviceError
from slideformer.runtime.cpu import CpuDevice
from slideformer.runtime.cuda import CudaDevice


def find_device(name: str) -> torch.device:
    """The device ``"cuda"``, ``"cpu"``, or with ``"auto"`` the GPU if there is one.

    Raises `DeviceError` if it is not usable, and `ConfigError` for another name.
    """
    if name not in ("auto", "cuda", "cpu"):
        raise ConfigError(f"device is {name!r}; use auto, cuda or cpu")
    if torch.cuda.is_available() and name != "cpu":
        return torch.device("cuda", torch.cuda.current_device())
    if name == "cuda":
        found = (
            "PyTorch was built without CUDA" if torch.version.cuda is None else "no GPU is usable"
        )
        raise DeviceError(f"device is 'cuda', but {found}; use --device cpu or --device auto")
    return torch.device("cpu")


def make_lanes(device: torch.device, workspace: int = 0) -> CudaDevice | CpuDevice:
    """The lanes of a scheduler on ``device``: on streams of the GPU, or on threads alone.

    ``workspace`` is what tasks' temporaries take, in bytes.
    """
    if device.type == "cuda":
        return CudaDevice(device.index or 0, workspace)
    return CpuDevice()
