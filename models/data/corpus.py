"""What a source holds, whatever its kind: a text or records, and the files that decide them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from slideformer.graph.errors import DataError
from slideformer.models.data.reading import (
    Record,
    is_known_suffix,
    is_plain_text,
    read_records,
    read_text,
    record_of,
)
from slideformer.models.data.sources import Source

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_FOLDER_FILES = ("dataset_dict.json", "state.json")
"""One of these is in every folder that ``save_to_disk`` of Hugging Face datasets writes."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """The contents of a source, which are those of ``files``: either ``text`` or ``records``."""

    name: str
    files: tuple[Path, ...]
    text: Callable[[], Iterator[str]] | None = None
    records: Callable[[], Iterator[Record]] | None = None


def check_source(source: Source) -> None:
    """Raise DataError for a source that can be told to be of no use without reading it."""
    if _is_local_file(source):
        is_plain_text(source.path)
    else:
        _library(source)


def open_corpus(source: Source) -> Corpus:
    """The contents of a source; a data set of the Hugging Face Hub is downloaded.

    Raises DataError for what is missing, of an unknown kind, or out of reach.
    """
    path = source.path
    if _is_local_file(source):
        if is_plain_text(path):
            return Corpus(str(path), (path,), text=partial(read_text, path))
        return Corpus(str(path), (path,), records=partial(read_records, path))
    rows = _load(source)
    name = f"{path}, {source.split}"
    files = tuple(Path(each["filename"]) for each in rows.cache_files)
    return Corpus(name, files, records=partial(_records, name, rows))


def _is_local_file(source: Source) -> bool:
    """Whether it is a file of ours, or missing, and not a Hugging Face data set."""
    path = source.path
    if path.is_dir():
        return not any((path / name).is_file() for name in _FOLDER_FILES)
    return path.exists() or not _HUB_NAME.fullmatch(str(path)) or is_known_suffix(path)


def _library(source: Source) -> Any:
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{source.path}: {_absent(source)}a data set of Hugging Face needs the package "
            "datasets: pip install 'slideformer[datasets]'"
        ) from None
    return datasets


def _load(source: Source) -> Any:
    """The rows of a folder's or of the Hub's data set, mapped from its files by the library."""
    library = _library(source)
    try:
        if source.path.is_dir():
            found = library.load_from_disk(str(source.path), keep_in_memory=False)
        else:
            name = str(source.path)
            found = library.load_dataset(name, split=source.split, keep_in_memory=False)
    except Exception as error:  # the library raises errors of many types
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{source.path}: {_absent(source)}the data set's split {source.split!r} cannot be had "
            f"from {'the folder' if source.path.is_dir() else 'the Hugging Face Hub'}: {reason}"
        ) from error
    if isinstance(found, library.DatasetDict):
        if source.split not in found:
            raise DataError(
                f"{source.path}: has no split {source.split!r}; choose one of "
                f"{', '.join(map(str, found))}: {{path: {source.path}, split: …}}"
            )
        return found[source.split]
    return found


def _absent(source: Source) -> str:
    return "" if source.path.is_dir() else "there is no such file, and "


def _records(name: str, rows: Iterable[dict[str, Any]]) -> Iterator[Record]:
    """Columns without a value in a row count as absent: a table has the same for all rows."""
    for number, row in enumerate(rows, start=1):
        yield record_of(f"{name}, row {number}", {k: v for k, v in row.items() if v is not None})
