"""What a process holds on the GPU beside what it asked for: CUDA's context, allocator's slack.

Measured in a process of its own, so that what others use there does not count.
"""

from __future__ import annotations

import multiprocessing
from contextlib import suppress
from multiprocessing.connection import Connection

import torch

from slideformer.graph.errors import DeviceError
from slideformer.measuring.product_rates import layer_config
from slideformer.measuring.stand_in import Arithmetic, StandIn
from slideformer.models.families import decoder_config
from slideformer.models.workspace import allocator_slack, head_workspace_bytes, workspace_bytes

_WIDTH, _ROWS, _SEQ_LEN, _VOCAB = 4096, 8, 1024, 32768
_PATIENCE = 120.0
"""Seconds in which the process must have measured."""


def gpu_overhead(device: torch.device) -> tuple[int, int]:
    """Bytes of a context with its libraries, and of what the allocator reserves beyond a plan.

    Raises `DeviceError` if the process that measures them fails.
    """
    torch.zeros(1, device=device)
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=_hold, args=(theirs, device.index or 0), daemon=True
    )
    torch.cuda.empty_cache()
    before = torch.cuda.mem_get_info(device)[0]
    process.start()
    theirs.close()
    try:
        if not ours.poll(_PATIENCE):
            raise DeviceError(f"a second process on {device} has not answered in {_PATIENCE:g} s")
        reserved, slack = ours.recv()
        after = torch.cuda.mem_get_info(device)[0]
        ours.send(None)
    except EOFError:
        raise DeviceError(f"a second process on {device} cannot compute; see its error") from None
    finally:
        process.join(10)
        if process.is_alive():
            process.kill()
        ours.close()
    return max(0, before - after - reserved), slack


def _hold(connection: Connection, index: int) -> None:
    """Compute a layer and a loss, report, and hold everything until told."""
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    config, tokens = layer_config(_WIDTH, _VOCAB), _ROWS * _SEQ_LEN
    sizes = Arithmetic(_ROWS, _SEQ_LEN, _ROWS, tokens // 2, "bf16")
    workspace = max(
        workspace_bytes(decoder_config(config), tokens, 2, _SEQ_LEN),
        head_workspace_bytes(_VOCAB, tokens // 2, tokens, 2) + tokens * _WIDTH * 2,
    )
    planned = workspace + allocator_slack(workspace)
    with torch.no_grad():
        stand_in = StandIn(config, sizes, device)
        asked = torch.cuda.memory_allocated(device)
        torch.empty(planned, device=device, dtype=torch.uint8)  # as runs take it
        for _ in range(2):
            stand_in.forward()
            stand_in.head()
            stand_in.backward()
        torch.cuda.synchronize(device)
    reserved = torch.cuda.memory_reserved(device)
    connection.send((reserved, max(0, reserved - asked - planned)))
    with suppress(EOFError):  # who asked has left
        connection.recv()
