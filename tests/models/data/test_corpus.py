"""Data sets of Hugging Face, in folders and from the Hub, and what is said without them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from slideformer.graph.errors import DataError
from slideformer.models.data.corpus import check_source, open_corpus
from slideformer.models.data.dataset import TokenDataset
from slideformer.models.data.sources import Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ROWS: list[dict[str, Any]] = [
    {"text": "a text", "prompt": None, "completion": None, "messages": None, "id": 1},
    {"text": None, "prompt": "p", "completion": "c", "messages": None, "id": 2},
    {
        "text": None,
        "prompt": None,
        "completion": None,
        "messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "v"}],
        "id": 3,
    },
]


def texts(dataset: TokenDataset, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    documents = [dataset.read(np.array([number]))[0].tolist() for number in range(len(dataset))]
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in documents]


class Rows(list[dict[str, Any]]):
    """What the library gives for a split: rows, and the files they are mapped from."""

    cache_files: tuple[dict[str, str], ...] = ()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A stand-in for the library; what is put in here is what the Hub has, by name and split."""
    known: dict[str, Any] = {}

    def load_dataset(name: str, *, split: str, keep_in_memory: bool) -> Rows:
        assert not keep_in_memory
        rows = Rows(known[f"{name} {split}"])
        file = tmp_path / f"{split}.arrow"
        file.write_text(repr(rows))
        rows.cache_files = ({"filename": str(file)},)
        return rows

    library = SimpleNamespace(load_dataset=load_dataset, DatasetDict=dict)
    monkeypatch.setitem(sys.modules, "datasets", library)
    return known


def test_a_data_set_of_the_hub(hub: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> None:
    hub["owner/some-set train"] = ROWS
    hub["owner/some-set test"] = ROWS[:1]
    source = Source(Path("owner/some-set"))
    check_source(source)
    dataset = TokenDataset.from_sources([source], tokenizer, 64)
    assert texts(dataset, tokenizer) == ["a text", "pc", "<|user|>\nu\n<|assistant|>\nv\n"]
    test = Source(Path("owner/some-set"), split="test")
    assert texts(TokenDataset.from_sources([test], tokenizer, 64), tokenizer) == ["a text"]
    hub["owner/some-set train"] = ROWS[1:2]
    dataset = TokenDataset.from_sources([source], tokenizer, 64)
    assert texts(dataset, tokenizer) == ["pc"], "other rows under the same name are seen"


def test_a_row_of_no_form_is_named(hub: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> None:
    hub["owner/set train"] = [{"text": "a"}, {"text": None, "label": 3}]
    with pytest.raises(DataError, match=r"owner/set, train, row 2: the keys \('label'\) are those"):
        TokenDataset.from_sources([Source(Path("owner/set"))], tokenizer, 64)


def test_what_the_hub_does_not_give_is_said(hub: dict[str, Any]) -> None:
    source = Source(Path("owner/none"))
    with pytest.raises(
        DataError,
        match=r"owner/none: there is no such file, and the data set's split 'train' cannot be had "
        r"from the Hugging Face Hub: 'owner/none train'",
    ):
        open_corpus(source)


@pytest.mark.parametrize("name", ["train.jsonl", "data/train.jsonl", "data/train.txt", "a/b/c"])
def test_a_missing_file_is_not_looked_for_on_the_hub(hub: dict[str, Any], name: str) -> None:
    for look in (check_source, open_corpus):
        with pytest.raises(DataError, match=f"^{name}: there is no such file; check the path$"):
            look(Source(Path(name)))


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    words = r"a data set of Hugging Face needs the package datasets: pip install 'slideformer\[dat"
    with pytest.raises(DataError, match=f"^owner/set: there is no such file, and {words}"):
        check_source(Source(Path("owner/set")))
    (tmp_path / "state.json").touch()
    with pytest.raises(DataError, match=f"^{tmp_path}: {words}"):
        check_source(Source(tmp_path))


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is a directory; name a .*, or a folder that save_"):
        check_source(Source(tmp_path))


class TestFolders:
    """What ``save_to_disk`` wrote, with the library itself."""

    @pytest.fixture(autouse=True)
    def library(self) -> Any:
        return pytest.importorskip("datasets")

    @pytest.fixture
    def save(self, library: Any, tmp_path: Path) -> Callable[..., Path]:
        library.disable_progress_bars()

        def write(name: str, **splits: list[dict[str, Any]]) -> Path:
            made = {key: library.Dataset.from_list(rows) for key, rows in splits.items()}
            saved = library.DatasetDict(made) if len(made) > 1 else next(iter(made.values()))
            saved.save_to_disk(tmp_path / name)
            return tmp_path / name

        return write

    def test_of_one_split(
        self, save: Callable[..., Path], tokenizer: PreTrainedTokenizerFast, cache: Path
    ) -> None:
        folder = save("one", train=ROWS)
        check_source(Source(folder))
        dataset = TokenDataset.from_file(folder, tokenizer, 64)
        assert texts(dataset, tokenizer) == ["a text", "pc", "<|user|>\nu\n<|assistant|>\nv\n"]
        TokenDataset.from_file(folder, tokenizer, 32)
        assert len(list((cache / "slideformer" / "tokens").iterdir())) == 1

    def test_of_several_splits(
        self, save: Callable[..., Path], tokenizer: PreTrainedTokenizerFast
    ) -> None:
        folder = save("two", train=ROWS, test=ROWS[:1])
        test = Source(folder, split="test")
        assert texts(TokenDataset.from_sources([test], tokenizer, 64), tokenizer) == ["a text"]
        assert len(TokenDataset.from_file(folder, tokenizer, 64)) == len(ROWS)
        with pytest.raises(DataError, match="has no split 'dev'; choose one of train, test: "):
            open_corpus(Source(folder, split="dev"))

    def test_damaged(self, save: Callable[..., Path]) -> None:
        folder = save("one", train=ROWS)
        for file in folder.glob("*.arrow"):
            file.unlink()
        with pytest.raises(DataError, match="split 'train' cannot be had from the folder: "):
            open_corpus(Source(folder))

    def test_the_hub_out_of_reach(self) -> None:
        # The tests run without a network.
        with pytest.raises(DataError, match=r"owner/set: there is no such file, and .* Hub: "):
            open_corpus(Source(Path("owner/set")))
