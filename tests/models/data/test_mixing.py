"""Several sources in one data set: numbering, weights, and the split for validation."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slideformer.graph.errors import DataError
from slideformer.models.data.batches import BatchStream
from slideformer.models.data.dataset import TokenDataset, load_datasets
from slideformer.models.data.parts import Part, part_of
from slideformer.models.data.sources import Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def part(first: int, lengths: list[int], weight: float = 1.0, seq_len: int = 8) -> Part:
    """A part whose document d is made of the token ``first + d``, every second one learnt."""
    ids = np.repeat(np.arange(first, first + len(lengths)), lengths).astype(np.int32)
    labels = np.arange(len(ids)) % 2 == 0
    made = part_of(ids, np.cumsum([0, *lengths]), labels, seq_len=seq_len)
    return replace(made, weight=weight)


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


PARTS = st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=6), min_size=1, max_size=4)


@given(lengths=PARTS, data=st.data())
def test_documents_are_numbered_through(lengths: list[list[int]], data: st.DataObject) -> None:
    parts = [part(100 * number, each) for number, each in enumerate(lengths)]
    dataset = TokenDataset(parts, seq_len=8)
    names = [100 * n + d for n, each in enumerate(lengths) for d in range(len(each))]
    held = [min(length, 8) for each in lengths for length in each]
    assert dataset.lengths.tolist() == held
    chosen = data.draw(st.lists(st.integers(0, len(names) - 1), max_size=9))
    ids, learnt = dataset.read(np.array(chosen, dtype=np.int64))
    assert ids.tolist() == [names[number] for number in chosen for _ in range(held[number])]
    apart = [dataset.read(np.array([number])) for number in chosen]
    assert learnt.tolist() == [each for _, labels in apart for each in labels]
    everything = dataset.read(np.arange(len(dataset)))[1]
    assert dataset.target_tokens == np.count_nonzero(everything)
    assert dataset.truncated_tokens == sum(max(0, n - 8) for each in lengths for n in each)


@given(
    lengths=PARTS,
    weights=st.lists(st.sampled_from([0.25, 0.5, 1.0, 1.5, 3.0]), min_size=4, max_size=4),
    packing=st.booleans(),
    seed=st.integers(0, 2**40),
)
def test_an_epoch_shows_each_source_by_its_weight(
    lengths: list[list[int]], weights: list[float], packing: bool, seed: int
) -> None:
    parts = [
        part(100 * number + 1, [length + 1 for length in each], weight)
        for number, (each, weight) in enumerate(zip(lengths, weights, strict=False))
    ]
    dataset = TokenDataset(parts, seq_len=8)
    stream = BatchStream(dataset, 2, seed, epochs=4, packing=packing)
    shown: Counter[int] = Counter()
    for batch in stream:
        assert batch.positions is None or packing
        starts = np.arange(8) == 0 if batch.positions is None else batch.positions.numpy() == 0
        ids = batch.input_ids.numpy()
        shown.update(int(id) for id in ids[(ids > 0) & starts])
    for number, (each, weight) in enumerate(zip(lengths, weights, strict=False)):
        found = [shown[100 * number + 1 + document] for document in range(len(each))]
        assert max(found) - min(found) <= 1
        if not packing:
            assert sum(found) == 4 * max(1, round(weight * len(each)))


def test_several_files_and_a_split_by_the_seed(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    one = write(tmp_path / "one.jsonl", [f"first {n}" for n in range(30)])
    two = write(tmp_path / "two.jsonl", [f"second {n}" for n in range(20)])
    sources = [Source(one), Source(two, 2.0)]

    def load(seed: int, share: float | None = 0.1) -> tuple[TokenDataset, TokenDataset | None]:
        return load_datasets(sources, [], share, tokenizer, seq_len=32, seed=seed)

    def texts(dataset: TokenDataset | None) -> list[str]:
        assert dataset is not None
        documents = [dataset.read(np.array([n]))[0].tolist() for n in range(len(dataset))]
        return [tokenizer.decode(ids, skip_special_tokens=True) for ids in documents]

    everything, nothing = load(0, None)
    assert nothing is None
    assert [part.weight for part in everything.parts] == [1.0, 2.0]
    train, aside = load(0)
    assert sorted(texts(train) + texts(aside)) == sorted(texts(everything))
    assert len(texts(aside)) == 5
    assert aside is not None
    assert {part.weight for part in aside.parts} == {1.0}, "each counts once"
    assert texts(aside) == texts(load(0)[1])
    assert texts(aside) != texts(load(1)[1])
    train, given = load_datasets(sources[:1], [Source(two)], None, tokenizer, seq_len=32, seed=0)
    assert texts(train) + texts(given) == texts(everything)


def test_a_split_that_leaves_nothing_is_refused(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = write(tmp_path / "one.jsonl", ["a text"])
    with pytest.raises(DataError, match=r"split of 0\.5 leaves no target token for training, out"):
        load_datasets([Source(path)], [], 0.5, tokenizer, seq_len=32, seed=0)
    path = write(tmp_path / "two.jsonl", ["a text", "", "", ""])
    for seed, name in enumerate(("validation", "training")):
        with pytest.raises(DataError, match=f"leaves no target token for {name}, out of 4"):
            load_datasets([Source(path)], [], 0.25, tokenizer, seq_len=32, seed=seed)


@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=20), keep=st.integers(0, 2**20))
@settings(max_examples=50)
def test_targets_are_counted_in_chunks(lengths: list[int], keep: int) -> None:
    from slideformer.models.data import parts

    chosen = np.array([bool(keep >> number & 1) for number in range(len(lengths))])
    some = part(0, lengths, seq_len=6).select(chosen)
    expected = [np.count_nonzero(some.read(np.array([n]))[1]) for n in range(len(some))]
    with pytest.MonkeyPatch.context() as patch:
        for tokens in (1, 5, 1 << 22):
            patch.setattr(parts, "_SCAN_TOKENS", tokens)
            assert replace(some).targets.tolist() == expected
