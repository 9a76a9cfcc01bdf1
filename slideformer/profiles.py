"""The profiles of this machine that ``slideformer profile`` measured, kept in the user's cache.

One file per device, number of cores, version of PyTorch and build of the CPU kernel, in the form of
``graph/machines.py``. Files are read as data and never run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path

from slideformer.graph.errors import ConfigError, DeviceError
from slideformer.graph.machines import Machine, parse_machine, write_machine
from slideformer.kernels.build import aside, cache_folder

logger = logging.getLogger(__name__)


def machine_key(device: str) -> dict[str, str]:
    """What a profile measured on ``"cuda"`` or ``"cpu"`` holds for."""
    import torch

    from slideformer.kernels.adamw_library import kernel_build

    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "cores": str(len(os.sched_getaffinity(0))),
        "torch": torch.__version__,
        "kernel": kernel_build(),
    }


def cached_machine(device: str = "auto") -> Machine | None:
    """The measured profile of this machine, or None; one that cannot be read is passed over.

    ``device`` is ``"cuda"``, ``"cpu"``, or ``"auto"`` for the GPU if there is one. Loads torch only
    if there are profiles at all.
    """
    try:
        folder = cache_folder()
        if not any(folder.glob("profile-*.json")):
            return None
        path = folder / _file_name(machine_key(_resolved(device)))
        return parse_machine(path.read_bytes(), str(path))
    except FileNotFoundError:
        return None
    except (OSError, ConfigError) as error:
        logger.warning(
            "The measured profile of this machine is not used (%s); measure again with "
            "`slideformer profile`.",
            error,
        )
        return None


def announce(machine: Machine) -> None:
    """Say that predictions are made by a measured profile."""
    logger.info(
        "Predicting for this machine, as `slideformer profile` measured it at %s",
        machine.measured.get("at", "a time unknown"),
    )


def store_machine(device: str, machine: Machine) -> Path:
    """Keep a profile measured on ``"cuda"`` or ``"cpu"`` for later runs; returns its file.

    Raises `DeviceError` if the cache cannot be used.
    """
    try:
        path = cache_folder() / _file_name(machine_key(device))
        with aside(path) as temporary:
            temporary.write_text(write_machine(machine), encoding="utf-8")
    except OSError as error:
        raise DeviceError(
            f"the profile cannot be kept ({error}); set XDG_CACHE_HOME to a folder of yours, or "
            "write it elsewhere with --output FILE"
        ) from None
    return path


def _resolved(device: str) -> str:
    if device != "auto":
        return device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _file_name(key: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return f"profile-{digest[:32]}.json"
