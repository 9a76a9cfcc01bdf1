"""Trains a shape from random weights with state on NVMe, and measures its lanes against the disk.

    python -m slideformer.tools.bench.nvme --shape llama2-13b --nvme /mnt/disk \
        --gpu-memory 24GiB --cpu-memory 115GiB --nvme-memory 55GiB --batch-size 8 --steps 6

Every step learns the same batch of random tokens, so the loss must fall. The plain loop of direct
I/O runs in the same folder before and after.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from slideformer.config import EngineConfig, format_size, parse_size
from slideformer.engine import Engine
from slideformer.graph.buffers import Tier, host_bytes
from slideformer.graph.errors import ConfigError
from slideformer.graph.plan import Budgets, MemoryPlan
from slideformer.graph.tasks import Lane
from slideformer.measuring.nvme_rates import disk_rates
from slideformer.measuring.trial import random_batches, shape_config
from slideformer.tools.console import run_alone

LANES = (Lane.NVME_READ, Lane.NVME_WRITE)


def nvme_bench(
    shape: Annotated[str, typer.Option(help="A named shape.")],
    nvme: Annotated[list[Path], typer.Option(help="Folder on NVMe; may be repeated.")],
    gpu_memory: Annotated[str | None, typer.Option(metavar="SIZE", help="GPU budget.")] = None,
    cpu_memory: Annotated[str | None, typer.Option(metavar="SIZE", help="Host budget.")] = None,
    nvme_memory: Annotated[str | None, typer.Option(metavar="SIZE", help="NVMe budget.")] = None,
    batch_size: Annotated[int, typer.Option(help="Rows per step.", min=1)] = 8,
    seq_len: Annotated[int, typer.Option(help="Tokens per row.", min=2)] = 1024,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 1e-5,
    steps: Annotated[int, typer.Option(help="Steps; the last ones are measured.", min=3)] = 6,
    plain: Annotated[str, typer.Option(metavar="SIZE", help="What the plain loop moves.")] = "4GiB",
    threads: Annotated[int, typer.Option(help="Threads of the plain loop each way.", min=1)] = 4,
    device: Annotated[str, typer.Option(help="auto, cuda or cpu.")] = "auto",
) -> None:
    """Train with state on NVMe and compare the NVMe lanes with a plain loop on the same disk."""
    config = EngineConfig.model_validate(
        {
            "model": "random",
            "nvme": nvme,
            "gpu_memory": gpu_memory,
            "cpu_memory": cpu_memory,
            "nvme_memory": nvme_memory,
            "batch_size": batch_size,
            "seq_len": seq_len,
            "lr": lr,
            "device": device,
        }
    )
    found = [disk_rates(nvme[0], parse_size(plain), threads)]
    lanes = train(shape, config, steps)
    found.append(disk_rates(nvme[0], parse_size(plain), threads))
    report(lanes, found)


def train(shape: str, config: EngineConfig, steps: int) -> dict[str, float]:
    """Train ``steps`` steps and print each; returns bytes/s of each lane, and of both together."""

    def show(plan: MemoryPlan, _: Budgets) -> None:
        if not plan.peaks.get(Tier.NVME, 0):
            raise ConfigError("the plan needs no NVMe under these budgets; lower --cpu-memory")
        print(
            f"plan: moments of {plan.nvme_moments} layers, lower halves of {plan.nvme_lo}, "
            f"boundaries of {plan.nvme_boundaries} and weights of {plan.nvme_hi} on NVMe, "
            f"{format_size(plan.peaks[Tier.NVME])}; host {format_size(host_bytes(plan.peaks))}, "
            f"GPU {format_size(plan.peaks[Tier.GPU])}",
            flush=True,
        )

    with Engine(config, initial=shape_config(shape), on_plan=show) as engine:
        (batch,) = random_batches(engine.spec.vocab, config.batch_size, config.seq_len, 1)
        done = time.perf_counter()
        previous = None
        for number in range(steps + 1):
            handle = engine.step(batch) if number < steps else None
            if previous is not None:
                previous.wait()
                now = time.perf_counter()
                print(f"step {previous.number}: loss {previous.loss():.4f}, {now - done:.2f} s")
                sys.stdout.flush()
                done = now
            previous = handle
        return lane_rates(engine)


def lane_rates(engine: Engine) -> dict[str, float]:
    """Bytes/s of the lanes while they are busy, over the last steps."""
    tasks = {task.name: task for task in engine.graph.tasks}
    spans = [s for s in engine.timeline().spans if s.lane in LANES and s.task in tasks]
    last = max(s.instance for s in spans)
    spans = [s for s in spans if s.instance > max(1, last - 2)]  # blocks never written read fast

    def rate(lanes: Iterable[Lane]) -> float:
        chosen = [s for s in spans if s.lane in lanes]
        moved = sum(tasks[s.task].cost.nbytes for s in chosen)
        busy, reached = 0.0, 0.0
        for span in sorted(chosen, key=lambda s: s.started):
            busy += max(0.0, span.stopped - max(span.started, reached))
            reached = max(reached, span.stopped)
        return moved / busy

    return {
        "read": rate([Lane.NVME_READ]),
        "write": rate([Lane.NVME_WRITE]),
        "both": rate(LANES),
    }


def report(lanes: dict[str, float], plain: list[dict[str, float]]) -> None:
    """Print the rates side by side.

    The lanes run at once, so their sum is the figure that compares; each alone is given beside it.
    """
    for way in ("read", "write", "both"):
        alone = ", ".join(f"{rates[way] / 1e9:.2f}" for rates in plain)
        print(f"{way}: lanes {lanes[way] / 1e9:.2f} GB/s, plain loop before and after {alone} GB/s")
    best = max(rates["both"] for rates in plain)
    print(f"NVMe lanes reach {lanes['both'] / best:.2f} of the plain loop")


def main(arguments: Any = None) -> None:
    """Run it without the rest of the command line."""
    run_alone(nvme_bench, arguments)


if __name__ == "__main__":
    main()
