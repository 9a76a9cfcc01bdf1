"""A tiny Llama with the byte tokenizer, saved as a user would have it, and files to train it on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from slideformer.models.data.byte_tokenizer import (
    END_OF_TEXT_ID,
    PAD_ID,
    VOCAB_SIZE,
    save_byte_tokenizer,
)
from tests.models.tiny import save, tiny_config, tiny_model

SEQ_LEN = 32
TEXT = "The quick brown fox jumps over the lazy dog. " * 40


def write_checkpoint(folder: Path, *, sharded: bool = False, **settings: Any) -> Path:
    """A model of about 100,000 parameters in FP32 and its tokenizer, in ``folder``."""
    config = tiny_config(
        vocab_size=VOCAB_SIZE,
        bos_token_id=END_OF_TEXT_ID,
        eos_token_id=END_OF_TEXT_ID,
        pad_token_id=PAD_ID,
        **settings,
    )
    save(tiny_model(config), folder, torch.float32, sharded=sharded)
    save_byte_tokenizer(folder)
    return folder


def write_text(path: Path) -> Path:
    """A plain text of 1,800 characters, so of 57 rows of `SEQ_LEN` bytes."""
    path.write_text(TEXT)
    return path


def write_lines(path: Path, *records: Any) -> Path:
    """JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
