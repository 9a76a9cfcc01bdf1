"""What a checkpoint costs the steps around it, against the rate of the disk.

    python -m slideformer.tools.bench.checkpoints --shape llama3-1b --folder /mnt/disk \
        --gpu-memory 24GiB --cpu-memory 100GiB --batch-size 16

Trains a shape from random weights: first steps alone, then as many with a checkpoint begun behind
the first. The plain loop of direct I/O writes in the same folder before and after; the mean of both
rates counts. Let the steps last until the checkpoint is in its place: all that it costs is counted.
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from slideformer.checkpoint_info import file_sizes
from slideformer.config import Config, format_size, parse_size
from slideformer.engine import Engine
from slideformer.graph.errors import ConfigError
from slideformer.handles import StepHandle
from slideformer.measuring.nvme_rates import disk_rates
from slideformer.measuring.trial import random_batches, shape_config
from slideformer.tools.console import run_alone

WARM_UP = 3
INTERVAL = 50
"""Steps between two checkpoints, for the share of the time that they take."""


def checkpoint_bench(
    shape: Annotated[str, typer.Option(help="A named shape.")],
    folder: Annotated[Path, typer.Option(help="Where the checkpoint goes; it is removed again.")],
    gpu_memory: Annotated[str | None, typer.Option(metavar="SIZE", help="GPU budget.")] = None,
    cpu_memory: Annotated[str | None, typer.Option(metavar="SIZE", help="Host budget.")] = None,
    batch_size: Annotated[int, typer.Option(help="Rows per step.", min=1)] = 16,
    seq_len: Annotated[int, typer.Option(help="Tokens per row.", min=2)] = 1024,
    steps: Annotated[
        int | None, typer.Option(help="Steps that are timed; 10, or 50 with a snapshot.", min=3)
    ] = None,
    plain: Annotated[str, typer.Option(metavar="SIZE", help="What the plain loop moves.")] = "4GiB",
    threads: Annotated[int, typer.Option(help="Threads of the plain loop.", min=1)] = 4,
    device: Annotated[str, typer.Option(help="auto, cuda or cpu.")] = "auto",
    snapshot: Annotated[
        bool, typer.Option("--snapshot", help="Write from a snapshot, if the host has room.")
    ] = False,
) -> None:
    """Time steps without and with a checkpoint being written."""
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder; give one on the disk to measure")
    if steps is None:
        steps = INTERVAL if snapshot else 10
    unused = {"data": "unused", "output": "unused"}
    config = Config.model_validate(
        {
            **unused,
            "checkpoint_every": INTERVAL if snapshot else None,
            "model": "random",
            "gpu_memory": gpu_memory,
            "cpu_memory": cpu_memory,
            "batch_size": batch_size,
            "seq_len": seq_len,
            "device": device,
        }
    )
    rates = [disk_rates(folder, parse_size(plain), threads)["write"]]
    with Engine(config, initial=shape_config(shape)) as engine:
        (batch,) = random_batches(engine.spec.vocab, batch_size, seq_len, 1)
        step = partial(engine.step, batch)
        timed(engine, step, WARM_UP)
        alone = statistics.median(timed(engine, step, steps) for _ in range(3))
        if snapshot and not engine.plan.snapshot:
            raise ConfigError("the host has no room for a snapshot; raise --cpu-memory")
        saving, durable = with_checkpoint(engine, step, steps, folder)
        sizes = file_sizes(engine.spec, engine.plan.compute, engine.plan.optimizer)
        nbytes = sum(sizes.values())
    rates.append(disk_rates(folder, parse_size(plain), threads)["write"])
    report(nbytes, alone / steps, saving - alone, durable, rates)


def timed(engine: Engine, step: Callable[[], StepHandle], steps: int) -> float:
    """Seconds of so many steps, from a quiet engine to the end of the last."""
    engine.synchronize()
    started = time.perf_counter()
    for _ in range(steps - 1):
        step()
    step().wait()
    return time.perf_counter() - started


def with_checkpoint(
    engine: Engine, step: Callable[[], StepHandle], steps: int, folder: Path
) -> tuple[float, float]:
    """The same with a checkpoint behind the first step; and seconds until that is in its place."""
    engine.synchronize()
    started = time.perf_counter()
    step()
    pending = engine.checkpoint(folder / "checkpoint-bench")
    try:
        for _ in range(steps - 2):
            step()
        step().wait()
        trained = time.perf_counter() - started
        written = pending.finish()
        durable = time.perf_counter() - started
    finally:
        pending.abort()
    shutil.rmtree(written)
    return trained, durable


def report(nbytes: int, step: float, added: float, durable: float, rates: list[float]) -> None:
    """Print the cost beside what the disk would take alone."""
    least = nbytes / statistics.mean(rates)
    alone = ", ".join(f"{rate / 1e9:.2f}" for rate in rates)
    print(f"a checkpoint has {format_size(nbytes)}; the disk writes {alone} GB/s before and after")
    print(f"a step takes {step:.3f} s; with a checkpoint all of them took {added:.2f} s more")
    print(f"that is {added / least:.2f} of the {least:.2f} s that the bytes take at that rate")
    print(f"it was in its place {durable:.2f} s after the first step was begun")
    share = added / (INTERVAL * step)
    print(f"with one every {INTERVAL} steps, {100 * share:.1f} % of the time")


def main(arguments: Any = None) -> None:
    """Run it without the rest of the command line."""
    run_alone(checkpoint_bench, arguments)


if __name__ == "__main__":
    main()
