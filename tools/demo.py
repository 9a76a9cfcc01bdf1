"""``make demo``: the whole way on one small model, in a few minutes on two cores.

Writes a Llama with random weights and a byte-level tokenizer as a Hugging Face model folder, trains
it on the language reference that ships with Python, reloads the result with plain transformers and
prints a text generated before and after. Needs no network.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

import slideformer as sf
from slideformer.tools.console import reporting_errors, set_up_logging, stderr_console
from slideformer.tools.progress import ConsoleProgress

FOLDER = Path("runs/demo")
PROMPT = "The "
STEPS = 400
SEQ_LEN = 256
SAMPLE_TOKENS = 200


def run_demo(folder: Path, **settings: Any) -> None:
    """The demonstration in ``folder``, which is emptied first; ``settings`` replace those below."""
    console = stderr_console()
    set_up_logging(console)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    shutil.rmtree(folder, ignore_errors=True)
    start, data, tuned = folder / "start", folder / "reference.txt", folder / "tuned"
    write_model(start)
    data.write_text(reference_text(), encoding="utf-8")
    print(
        f"Wrote a Llama with random weights to {start} and Python's language reference to {data}."
    )
    print_sample("Before", start)
    cuda = torch.cuda.is_available()
    config = sf.Config(
        **{
            "model": start,
            "data": data,
            "output": tuned,
            "batch_size": 4,
            "seq_len": SEQ_LEN,
            "steps": STEPS,
            "lr": 1e-3,
            # CPUs without BF16 units are many times slower in it.
            "compute": "bf16" if cuda else "fp32",
            "log_every": 25,
            **settings,
        }
    )
    result = sf.Trainer(config).train(ConsoleProgress(console))
    with (tuned / "metrics.jsonl").open() as metrics:
        first = json.loads(metrics.readline())["loss"]
    print(
        f"Saved {tuned} after {result.steps} steps: the loss fell from {first:.2f} to "
        f"{result.loss:.2f}."
    )
    print_sample("After", tuned)


def write_model(folder: Path) -> None:
    """A Llama of 2.3 million parameters with random weights, and the tokenizer of bytes."""
    tokenizer = sf.save_byte_tokenizer(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.05,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)


def reference_text() -> str:
    """The prose of Python's language reference: its help topics without their tables."""
    from pydoc_data.topics import topics

    paragraphs = "\n".join(topics.values()).split("\n\n")
    return "\n\n".join(each for each in paragraphs if "|" not in each and "---" not in each)


def print_sample(when: str, folder: Path) -> None:
    """A text that transformers generates from the checkpoint in ``folder``."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(0)
    ids = model.generate(
        **tokenizer(PROMPT, return_tensors="pt"),
        min_new_tokens=SAMPLE_TOKENS,
        max_new_tokens=SAMPLE_TOKENS,
        do_sample=True,
        temperature=0.7,
        pad_token_id=tokenizer.pad_token_id,
    )
    text = tokenizer.decode(ids[0], skip_special_tokens=True)
    # Random bytes may be commands to the terminal.
    shown = "".join(char if char.isprintable() or char == "\n" else "·" for char in text)
    print(f"\n{when}: {shown}\n", flush=True)


def main() -> None:
    """Run it as the command line does: one clear message for an error."""
    with reporting_errors():
        run_demo(FOLDER)


if __name__ == "__main__":
    main()
