"""Tokenised data, kept on disk and mapped into memory: a file is tokenised once, however large.

An entry is a folder named by a key over all that decides its tokens: the file's bytes, the
tokenizer with its chat template, the versions of both libraries, and the format. It holds whole
documents, so it serves every sequence length. The file is read through for its digest each time:
that takes a small part of a run's time, and misses no change, as a look at size and date would.
What is mapped is checked as well, and a damaged entry is made anew.

Entries are written aside and renamed, in a folder that only their owner can read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
import shutil
import tempfile
import time
from array import array
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tokenizers
import transformers
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from slideformer.graph.errors import CheckpointError, DataError
from slideformer.kernels.build import cache_folder
from slideformer.models.aside import AsideFolder, fsync
from slideformer.models.data.corpus import Corpus
from slideformer.models.data.reading import open_file
from slideformer.models.data.tokenise import RowTokenizer, cut_text, groups, record_chars

logger = logging.getLogger(__name__)

_MANIFEST = "manifest.json"
_FILES: dict[str, type[Any]] = {"ids": np.int32, "labels": np.bool_, "offsets": np.int64}
_REPORT_SECONDS = 30.0

Document = tuple[NDArray[np.int32], NDArray[np.bool_]]


class _Manifest(BaseModel):
    """What an entry holds beside its files: the largest token id, and the files' digests."""

    model_config = ConfigDict(strict=True, extra="forbid")

    version: Literal[1]
    largest_id: Annotated[int, Field(ge=0)]
    digests: dict[str, str]


@dataclass(frozen=True, eq=False)
class Tokens:
    """The documents of a file, whole: document d is ``ids[offsets[d]:offsets[d + 1]]``.

    ids: int32 [tokens] and labels: bool [tokens], True where a token is learnt, are mapped from the
    disk. offsets: int64 [documents + 1]. ``digest`` tells these contents from any others.
    """

    ids: NDArray[np.int32]
    labels: NDArray[np.bool_]
    offsets: NDArray[np.int64]
    largest_id: int
    digest: str


def tokenised(corpus: Corpus, tokenizer: RowTokenizer) -> Tokens:
    """The tokens of a corpus, from the cache where it has them; a plain text is one document.

    Raises DataError for whatever is wrong with it, for a file that changes meanwhile, and for a
    disk without room.
    """
    before = _state(corpus)
    key = _key(corpus, tokenizer)
    try:
        folder = cache_folder() / "tokens"
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        logger.warning(
            "The cache is not usable (%s): %s is tokenised for this process alone. Set "
            "XDG_CACHE_HOME to a folder of yours to do it once.", error, corpus.name,
        )  # fmt: skip
        with tempfile.TemporaryDirectory(prefix="slideformer-") as temporary:
            found = _entry(Path(temporary) / key, corpus, tokenizer)  # files stay while mapped
    else:
        found = _entry(folder / key, corpus, tokenizer)
    if _state(corpus) != before:
        raise DataError(
            f"{corpus.name}: changed while it was read; start again when it is complete"
        )
    return found


def release(held: NDArray[Any]) -> None:
    """Let go of the memory behind an array that is mapped; read again, it comes from the disk."""
    base: Any = held
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, memoryview) and isinstance(base.obj, mmap.mmap):
        base.obj.madvise(mmap.MADV_DONTNEED)


def _entry(folder: Path, corpus: Corpus, tokenizer: RowTokenizer) -> Tokens:
    name = corpus.name
    found = _open(folder)
    if found is None:
        logger.info("%s: tokenising; the tokens are kept in %s", name, folder)
        try:
            joined = corpus.text is not None
            folder = _write(folder, _documents(corpus, tokenizer), joined=joined)
        except (OSError, CheckpointError) as error:
            reason = getattr(error, "strerror", None) or error
            raise DataError(
                f"{name}: its tokens cannot be kept in {folder.parent}: {reason}; they need one to "
                "two times the size of the file: make room, or set XDG_CACHE_HOME to another folder"
            ) from error
        found = _open(folder)
    if found is None:
        raise DataError(f"{name}: its tokens in {folder} were damaged by something; try again")
    return found


def _documents(corpus: Corpus, tokenizer: RowTokenizer) -> Iterator[list[Document]]:
    """The documents of a corpus in groups, or the parts of a plain text."""
    if corpus.text is not None:
        for ids in tokenizer.document(cut_text(corpus.text())):
            yield [(ids, np.ones(len(ids), dtype=np.bool_))]
    if corpus.records is not None:
        for group in groups(corpus.records(), record_chars):
            yield [(row.ids, row.labels) for row in tokenizer.rows(group)]


def _write(folder: Path, documents: Iterable[list[Document]], *, joined: bool) -> Path:
    """Write an entry and return where it lies; ``joined``: all of it is one document.

    Raises OSError or CheckpointError where it cannot be written.
    """
    if folder.exists():
        logger.warning("%s is damaged or of another version, and is made anew", folder)
        shutil.rmtree(folder)
    aside = AsideFolder(folder)
    try:
        offsets, largest = array("q", [0]), 0
        with ExitStack() as stack:
            files = {name: stack.enter_context((aside.path / name).open("xb")) for name in _FILES}
            reported = time.monotonic()
            for group in documents:
                for ids, labels in group:
                    files["ids"].write(ids.tobytes())
                    files["labels"].write(labels.tobytes())
                    largest = max(largest, int(ids.max(initial=0)))
                    offsets.append(offsets[-1] + len(ids))
                if time.monotonic() > reported + _REPORT_SECONDS:
                    logger.info("tokenised %s tokens so far", f"{offsets[-1]:,}")
                    reported = time.monotonic()
            files["offsets"].write(array("q", [0, offsets[-1]]) if joined else offsets)
        digests = {name: _digest(aside.path / name) for name in _FILES}
        manifest = _Manifest(version=1, largest_id=largest, digests=digests)
        (aside.path / _MANIFEST).write_text(manifest.model_dump_json(), encoding="utf-8")
        for name in (*_FILES, _MANIFEST):
            fsync(aside.path / name)
        # Another run may have been faster.
        return folder if folder.exists() else aside.move()
    finally:
        aside.abort()


def _open(folder: Path) -> Tokens | None:
    """The entry in ``folder``, or None if there is none that is whole."""
    try:
        manifest = _Manifest.model_validate_json((folder / _MANIFEST).read_bytes())
        if {name: _digest(folder / name) for name in _FILES} != manifest.digests:
            return None
        arrays = {name: _mapped(folder / name, kind) for name, kind in _FILES.items()}
    except (OSError, ValidationError, DataError):
        return None
    digest = hashlib.blake2b(json.dumps(manifest.digests, sort_keys=True).encode()).hexdigest()
    return Tokens(**arrays, largest_id=manifest.largest_id, digest=digest)


def _mapped(path: Path, kind: type[Any]) -> NDArray[Any]:
    """A file as a read-only array that takes memory only where it is read."""
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return np.empty(0, dtype=kind)
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=kind)


def _key(corpus: Corpus, tokenizer: RowTokenizer) -> str:
    """A name over all that decides the tokens of a corpus."""
    parts = {
        "format": 1,
        "files": [_digest(path) for path in corpus.files],
        "plain text": corpus.text is not None,
        "tokenizer": tokenizer.identity(),
        "libraries": [transformers.__version__, tokenizers.__version__],
    }
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def _digest(path: Path) -> str:
    """The digest of a file's bytes. Raises DataError if it cannot be read."""
    with open_file(path) as file:
        try:
            return hashlib.file_digest(file, "blake2b").hexdigest()
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def _state(corpus: Corpus) -> list[tuple[int, int]]:
    """Size and date of the files of a corpus."""
    found = []
    for path in corpus.files:
        with open_file(path) as file:
            state = os.fstat(file.fileno())
        found.append((state.st_size, state.st_mtime_ns))
    return found
