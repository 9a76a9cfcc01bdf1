"""Does training train? Losses on real text against baseline R2's, from the same start.

A small Llama with random weights is saved once; the engine and R2 (FP32 masters, everything on the
GPU) fine-tune it on the same batches of bytes. The text is the reference of the Python language
that comes with Python.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from pydoc_data import topics
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slideformer.tools.bench.worker import Worker

LEAST_FALL = 0.20
"""Share of the first loss that training must take off."""

MOST_APART = 0.01
"""Largest relative distance from R2's loss, at every step."""


@dataclass(frozen=True, slots=True)
class Size:
    """Sizes of the model and of its training."""

    hidden: int = 768
    intermediate: int = 2048
    layers: int = 12
    heads: int = 12
    batch_size: int = 16
    seq_len: int = 512
    steps: int = 20
    lr: float = 5e-4


SMALL = Size(hidden=128, intermediate=256, layers=2, heads=4, batch_size=4, seq_len=128, lr=2e-3)
"""For machines without a GPU."""


def text_batches(size: Size) -> NDArray[np.int64]:
    """Consecutive bytes of the text, int64 [steps, B, S]; it starts anew where it is too short."""
    text = "\n".join(topics.topics[name] for name in sorted(topics.topics)).encode()
    wanted = size.steps * size.batch_size * size.seq_len
    data = np.resize(np.frombuffer(text, dtype=np.uint8), wanted).astype(np.int64)
    return data.reshape(size.steps, size.batch_size, size.seq_len)


def model_config(size: Size) -> dict[str, Any]:
    """Settings of a byte-level Llama."""
    return {
        "model_type": "llama",
        "vocab_size": 256,
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.heads // 2,
        "max_position_embeddings": size.seq_len,
        "bos_token_id": None,
        "eos_token_id": None,
        "tie_word_embeddings": False,
    }


def check_losses(
    device: str, settings: Mapping[str, Any], *, frozen: bool = False, size: Size | None = None
) -> dict[str, Any]:
    """Train both and judge; ``settings`` are the engine's.

    ``frozen`` trains the engine with a learning rate of zero, which the check must notice. Raises
    `WorkerError` if one of the two cannot run.
    """
    ours = Worker("slideformer.tools.bench.ours:Ours")
    theirs = Worker("slideformer.tools.bench.baseline:Baseline")
    try:
        with tempfile.TemporaryDirectory(prefix="slideformer-loss-") as folder:
            device = ours.ask("hello", device=device)["device"]
            size = size or (Size() if device == "cuda" else SMALL)
            model, tokens = str(Path(folder, "model")), str(Path(folder, "tokens.npy"))
            np.save(tokens, text_batches(size))
            liger = theirs.ask("hello", device=device)["liger"]
            theirs.ask("save_model", config=model_config(size), folder=model, seed=0)
            theirs.ask("prepare_folder", recipe="R2", folder=model, tokens=tokens, lr=size.lr)
            resident = theirs.ask("losses")
            wanted = {"batch_size": size.batch_size, "seq_len": size.seq_len, "model": model}
            ours.ask("build", shape=None, settings={**settings, **wanted})
            streamed = ours.ask("losses", tokens=tokens, lr=0.0 if frozen else size.lr)
            ours.ask("release")
    finally:
        ours.close()
        theirs.close()
    return {
        "size": asdict(size),
        "device": device,
        "liger": liger,
        "frozen": frozen,
        "ours": streamed,
        "theirs": resident,
        **judge(streamed, resident),
    }


def judge(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """How far the losses fell, how far apart they are, and whether that is good enough."""
    fall = 1 - ours[-1] / ours[0]
    apart = max(abs(a / b - 1) for a, b in zip(ours, theirs, strict=True))
    return {"fall": fall, "apart": apart, "passed": fall >= LEAST_FALL and apart <= MOST_APART}


def report(found: Mapping[str, Any]) -> list[str]:
    """Lines for reading."""

    def row(name: str, losses: Sequence[float]) -> str:
        return f"{name:5}" + " ".join(f"{loss:.3f}" for loss in losses)

    verdict = "passed" if found["passed"] else "FAILED"
    return [
        row("ours", found["ours"]),
        row("R2", found["theirs"]),
        f"loss check on {found['device']}{', frozen' if found['frozen'] else ''}: {verdict}; "
        f"fell by {found['fall']:.1%} (at least {LEAST_FALL:.0%}), "
        f"at most {found['apart']:.2%} from R2 (at most {MOST_APART:.0%})",
    ]
