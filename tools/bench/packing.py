"""Trains a shape on documents of uneven lengths, one to a row and packed, and compares the speeds.

    python -m slideformer.tools.bench.packing --shape llama3-3b --gpu-memory 24GiB \
        --cpu-memory 60GiB --batch-size 16 --seq-len 1024 --steps 8

Both sides get the same documents of random tokens: log-normal lengths, a third of the row on
average. What counts is real tokens per second, padding left out. Each side has an engine of its own
and runs after the other, so that both have the whole machine.
"""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from slideformer.config import EngineConfig
from slideformer.engine import Engine
from slideformer.measuring.trial import log_normal_stream, shape_config
from slideformer.tools.console import run_alone

DOCUMENTS = 20_000
WARM_UP = 2


def packing_bench(
    shape: Annotated[str, typer.Option(help="A named shape.")],
    gpu_memory: Annotated[str | None, typer.Option(metavar="SIZE", help="GPU budget.")] = None,
    cpu_memory: Annotated[str | None, typer.Option(metavar="SIZE", help="Host budget.")] = None,
    batch_size: Annotated[int, typer.Option(help="Rows per step.", min=1)] = 16,
    seq_len: Annotated[int, typer.Option(help="Tokens per row.", min=8)] = 1024,
    steps: Annotated[int, typer.Option(help="Measured steps.", min=1)] = 8,
    rounds: Annotated[int, typer.Option(help="Turns of each side.", min=1)] = 2,
    device: Annotated[str, typer.Option(help="auto, cuda or cpu.")] = "auto",
) -> None:
    """Print real tokens per second of padded and of packed rows, and their ratio."""
    config = EngineConfig.model_validate(
        {
            "model": "random",
            "gpu_memory": gpu_memory,
            "cpu_memory": cpu_memory,
            "batch_size": batch_size,
            "seq_len": seq_len,
            "device": device,
        }
    )
    best: dict[str, float] = {}
    for packing in [False, True] * rounds:
        speed, padding = measure(shape, config, steps, packing=packing)
        name = "packed" if packing else "padded"
        print(f"{name}: {speed:,.0f} real tokens/s, {padding:.1%} padding", flush=True)
        best[name] = max(speed, best.get(name, 0.0))
    print(f"packed rows train {best['packed'] / best['padded']:.2f} times as many tokens a second")


def measure(shape: str, config: EngineConfig, steps: int, *, packing: bool) -> tuple[float, float]:
    """Real tokens per second over ``steps`` steps after the warm-up, and their padding share."""
    config = config.model_copy(update={"packing": packing})
    with Engine(config, initial=shape_config(shape)) as engine:
        stream = log_normal_stream(
            engine.spec.vocab, config.seq_len, config.step_rows, DOCUMENTS, packing=packing
        )
        batches = [stream.batch(number) for number in range(WARM_UP + steps)]
        for batch in batches[:WARM_UP]:
            handle = engine.step(batch)
        handle.wait()
        start = time.perf_counter()
        for batch in batches[WARM_UP:]:
            following = engine.step(batch)
            handle.wait()
            handle = following
        handle.wait()
        seconds = time.perf_counter() - start
    real = sum(batch.real_tokens for batch in batches[WARM_UP:])
    return real / seconds, 1 - real / (steps * config.step_rows * config.seq_len)


def main(arguments: Any = None) -> None:
    """Run it without the rest of the command line."""
    run_alone(packing_bench, arguments)


if __name__ == "__main__":
    main()
