"""The tokenizer of a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

from transformers import AutoTokenizer

from slideformer.graph.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a model folder; code that a folder ships is never run.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    # Asked without files, some tokenizer classes give one of an empty vocabulary.
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise CheckpointError(
            f"model folder {folder} has no tokenizer (tokenizer.json): copy the tokenizer's files "
            "of the same model there"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # of many types, for a damaged file that one itself
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(
            f"the tokenizer in {folder} cannot be read ({reason}): download it again"
        ) from error
    # It may be a slow one all the same, which is the data set's to refuse.
    return cast("PreTrainedTokenizerFast", tokenizer)
