"""Weights survive the way in and out bit for bit, and every damaged folder is named, not loaded."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from slideformer.graph.errors import CheckpointError
from slideformer.kernels.split import split_master
from slideformer.models import export, weights
from slideformer.models.aside import check_output
from slideformer.models.export import HuggingFaceWriter
from slideformer.models.families import read_model_config
from slideformer.models.safetensors_file import read_header
from slideformer.models.stored_weights import check_weights
from slideformer.models.units import EMBED_KEY, HEAD_KEY, model_spec
from slideformer.models.weights import init_random, load_weights
from tests.models.tiny import (
    VARIANTS,
    Masters,
    by_stored_name,
    empty_masters,
    joined,
    padding,
    save,
    tiny_config,
    tiny_model,
)

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
Folder = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """Makes a saved tiny model; arguments as those of ``tiny_config`` and ``save``."""

    def make(
        variant: str = "llama",
        *,
        tied: bool = False,
        dtype: torch.dtype = torch.float32,
        sharded: bool = False,
    ) -> Path:
        model = tiny_model(tiny_config(variant, tied=tied))
        return save(model, tmp_path / "source", dtype, sharded=sharded)

    return make


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut even tiny parameters into pieces, at places that are no row's start."""
    monkeypatch.setattr(weights, "PIECE", 1000)
    monkeypatch.setattr(weights, "_PIECE_BYTES", 4000)
    monkeypatch.setattr(export, "PIECE", 777)


def check(source: Path) -> torch.dtype:
    return check_weights(source, model_spec(read_model_config(source)))


def refusal(source: Path) -> str:
    """The complaint of loading, which the check of the headers alone must share."""
    with pytest.raises(CheckpointError) as loading:
        load(source)
    with pytest.raises(CheckpointError) as checking:
        check(source)
    assert str(checking.value) == str(loading.value)
    return str(loading.value)


def load(source: Path) -> tuple[Masters, torch.dtype]:
    spec = model_spec(read_model_config(source))
    masters = empty_masters(spec)
    return masters, load_weights(source, spec, masters)


def write(source: Path, output: Path, masters: Masters, dtype: torch.dtype) -> None:
    spec = model_spec(read_model_config(source))
    with HuggingFaceWriter(source, output, spec, masters, dtype) as writer:
        for unit in spec.units:
            writer.write_unit(unit.name)
        writer.finish()


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite a safetensors or JSON file after ``change`` to its content."""
    if path.suffix == ".json":
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
    else:
        tensors = load_file(path)
        # Copies, as the file they are mapped from is overwritten.
        tensors = {key: tensor.clone() for key, tensor in tensors.items()}
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})


# In and out


ROUND_TRIPS = [
    *itertools.product(["llama"], [False, True], DTYPES, [False, True]),
    *itertools.product([v for v in VARIANTS if v != "llama"], [False, True], ["F32"], [True]),
]


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize(("variant", "tied", "dtype", "sharded"), ROUND_TRIPS)
def test_round_trip_is_exact(
    folder: Folder, tmp_path: Path, variant: str, tied: bool, dtype: str, sharded: bool
) -> None:
    source = folder(variant, tied=tied, dtype=DTYPES[dtype], sharded=sharded)
    spec = model_spec(read_model_config(source))
    original = AutoModelForCausalLM.from_pretrained(source)

    masters, stored = load(source)
    assert stored is DTYPES[dtype]
    named = by_stored_name(original.config, dict(original.named_parameters()))
    assert named.keys() == {key for key, _ in joined(spec, masters)}
    for key, values in joined(spec, masters):
        assert torch.equal(values, named[key].float()), key
    assert not padding(spec, masters).any()

    write(source, tmp_path / "out", masters, stored)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert saved.dtype is saved.config.dtype is DTYPES[dtype]
    assert (saved.lm_head.weight is saved.model.embed_tokens.weight) is tied
    expected = original.state_dict()
    assert saved.state_dict().keys() == expected.keys()
    for key, values in saved.state_dict().items():
        assert values.dtype is DTYPES[dtype]
        assert torch.equal(values, expected[key]), key
    assert saved.config.to_diff_dict() == original.config.to_diff_dict()


def test_bf16_is_saved_as_the_rounded_master(folder: Folder, tmp_path: Path) -> None:
    source = folder()
    masters, _ = load(source)
    write(source, tmp_path / "out", masters, torch.bfloat16)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert saved.dtype is saved.config.dtype is torch.bfloat16
    spec = model_spec(saved.config)
    for key, values in joined(spec, masters):
        found = saved.get_parameter(key).float()
        assert torch.all((found - values).abs() <= values.abs() * 2**-8), key
        assert not torch.equal(found, values)


def test_config_of_an_older_transformers_keeps_one_dtype(folder: Folder, tmp_path: Path) -> None:
    source = folder(dtype=torch.bfloat16)
    edit(source / "config.json", lambda c: c.update(torch_dtype=c.pop("dtype"), my_field="ü"))
    masters, _ = load(source)
    write(source, tmp_path / "out", masters, torch.float32)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "float32"
    assert "torch_dtype" not in config
    assert config["my_field"] == "ü"


def test_tokenizer_and_generation_config_come_along(folder: Folder, tmp_path: Path) -> None:
    source = folder()
    alphabet = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    fast.chat_template = "{{ messages }}"
    fast.save_pretrained(source)
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (source / "optimizer.pt").write_text("not part of a model")
    edit(source / "generation_config.json", lambda c: c.update(top_k=17))

    masters, stored = load(source)
    write(source, tmp_path / "out", masters, stored)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "optimizer.pt" not in names
    assert "model.safetensors" not in names
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.encode("naïve <end>") == fast.encode("naïve <end>")
    assert again.get_chat_template() == "{{ messages }}"
    assert again.get_chat_template("tools") == "{{ tools }}"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.generation_config.top_k == 17


def test_units_are_written_in_any_order_from_threads(folder: Folder, tmp_path: Path) -> None:
    source = folder("qwen2")
    masters, stored = load(source)
    spec = model_spec(read_model_config(source))
    with HuggingFaceWriter(source, tmp_path / "out", spec, masters, stored) as writer:
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(writer.write_unit, [unit.name for unit in reversed(spec.units)]))
        writer.finish()
    original = AutoModelForCausalLM.from_pretrained(source).state_dict()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(saved[key], original[key]) for key in original)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_an_empty_output_folder_is_taken(folder: Folder, tmp_path: Path) -> None:
    source = folder()
    masters, stored = load(source)
    (tmp_path / "a" / "out").mkdir(parents=True)
    write(source, tmp_path / "a" / "out", masters, stored)
    write(source, tmp_path / "new" / "er" / "out", masters, stored)
    assert (tmp_path / "a" / "out" / "config.json").exists()
    assert (tmp_path / "new" / "er" / "out" / "config.json").exists()


# Checkpoints that are unusual but sound


def test_weights_in_several_dtypes_count_as_the_commonest(
    folder: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    source = folder(dtype=torch.bfloat16)
    expected = AutoModelForCausalLM.from_pretrained(source)
    key = "model.norm.weight"
    edit(source / "model.safetensors", lambda t: t.update({key: t[key].float()}))
    masters, stored = load(source)
    assert stored is torch.bfloat16
    assert "bfloat16 and float32" in caplog.text
    spec = model_spec(read_model_config(source))
    for name, values in joined(spec, masters):
        assert torch.equal(values, expected.get_parameter(name).float())


def test_a_tied_head_may_be_stored_too_if_equal(folder: Folder) -> None:
    source = folder(tied=True)
    before, _ = load(source)
    weights = source / "model.safetensors"
    edit(weights, lambda t: t.update({HEAD_KEY: t[EMBED_KEY].clone()}))
    after, _ = load(source)
    assert all(torch.equal(after[u][half], before[u][half]) for u in before for half in (0, 1))
    edit(weights, lambda t: t[HEAD_KEY][-1, -1:].add_(1))
    assert check(source) is torch.float32  # which reads no values
    with pytest.raises(CheckpointError, match=r"differs from.*tie_word_embeddings to false"):
        load(source)
    edit(weights, lambda t: t.update({HEAD_KEY: t[EMBED_KEY].bfloat16()}))
    assert "differs from" in refusal(source)


def test_a_tied_model_may_be_stored_by_its_head_alone(folder: Folder) -> None:
    source = folder(tied=True)
    before, _ = load(source)
    edit(source / "model.safetensors", lambda t: t.update({HEAD_KEY: t.pop(EMBED_KEY)}))
    after, _ = load(source)
    assert all(torch.equal(after[u][half], before[u][half]) for u in before for half in (0, 1))


def test_rotary_frequencies_of_old_checkpoints_are_ignored(folder: Folder) -> None:
    source = folder()
    key = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit(source / "model.safetensors", lambda t: t.update({key: torch.ones(8)}))
    load(source)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_check_reads_headers_alone(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    source = folder(dtype=DTYPES[dtype], sharded=True)

    def fail(*_: object) -> None:
        raise AssertionError("values were read")

    monkeypatch.setattr("os.preadv", fail)
    assert check(source) is DTYPES[dtype]
    with pytest.raises(AssertionError, match="values were read"):
        load(source)


# Checkpoints that are not


def test_a_tensor_that_does_not_fit_is_named(folder: Folder) -> None:
    source = folder()
    weights, key = source / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    whole = weights.read_bytes()

    def refused(change: Callable[[dict[str, Any]], Any], *words: str) -> None:
        weights.write_bytes(whole)
        edit(weights, change)
        found = refusal(source)
        assert all(word in found for word in (*words, str(source)))

    refused(lambda t: t.pop(key), "1 tensor missing", key)
    refused(lambda t: (t.pop(key), t.pop("model.norm.weight")), "2 tensors missing, first", key)
    refused(
        lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}),
        "1 tensor not part of the model",
        "model.layers.0.self_attn.q_proj.bias",
    )
    refused(lambda t: t.update({key: t[key][:-1]}), key, "[95, 64]", "[96, 64]", weights.name)
    refused(lambda t: t.update({key: t[key].view(64, 96)}), key, "[64, 96]", "[96, 64]")
    refused(lambda t: t.update({key: t[key].double()}), key, "F64", "F32, BF16, F16")
    refused(lambda t: t.update({key: t[key].to(torch.int8)}), key, "I8", "F32, BF16, F16")


def test_masters_are_untouched_where_the_check_fails(folder: Folder) -> None:
    source = folder()
    edit(source / "model.safetensors", lambda t: t.pop("model.norm.weight"))
    spec = model_spec(read_model_config(source))
    masters = empty_masters(spec)
    with pytest.raises(CheckpointError):
        load_weights(source, spec, masters)
    rubbish = empty_masters(spec)
    assert all(torch.equal(masters[u][half], rubbish[u][half]) for u in masters for half in (0, 1))


def test_a_damaged_index_is_named(folder: Folder) -> None:
    source = folder(sharded=True)
    index = source / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    first, *_ = shards = sorted(set(whole["weight_map"].values()))
    assert len(shards) > 2

    for content in (
        "{",
        "[]",
        "{}",
        "[" * 100_000,
        '{"weight_map": {"a": 1}}',
        '{"weight_map": ["a"]}',
    ):
        index.write_text(content)
        found = refusal(source)
        assert "is damaged" in found
        assert index.name in found

    index.write_text(json.dumps(whole))
    other = next(s for s in shards if s != whole["weight_map"][EMBED_KEY])
    edit(index, lambda c: c["weight_map"].update({EMBED_KEY: other}))
    assert f"{other} lacks tensor {EMBED_KEY}" in refusal(source)

    index.write_text(json.dumps(whole))
    (source / first).unlink()
    found = refusal(source)
    assert f"lacks 1 of the {len(shards)} shards" in found
    assert first in found


def test_a_folder_without_safetensors_is_told_what_to_do(folder: Folder) -> None:
    source = folder()
    (source / "model.safetensors").unlink()
    assert "was the download complete" in refusal(source)
    (source / "pytorch_model.bin").touch()
    found = refusal(source)
    assert "*.bin files" in found
    assert "save_pretrained" in found


@pytest.fixture(scope="module")
def saved_bytes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A folder to damage, and the content of its weights before."""
    config = tiny_config(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    source = save(tiny_model(config), tmp_path_factory.mktemp("m") / "source", torch.bfloat16)
    return source, (source / "model.safetensors").read_bytes()


@given(kept=st.floats(0, 1, exclude_max=True))
def test_a_file_cut_anywhere_is_named(saved_bytes: tuple[Path, bytes], kept: float) -> None:
    source, whole = saved_bytes
    (source / "model.safetensors").write_bytes(whole[: int(kept * len(whole))])
    found = refusal(source)
    assert "model.safetensors " in found
    assert "cut short" in found


@given(data=st.data())
def test_a_header_with_any_byte_changed_fails_cleanly_or_loads(
    saved_bytes: tuple[Path, bytes], data: st.DataObject
) -> None:
    source, whole = saved_bytes
    header = 8 + int.from_bytes(whole[:8], "little")
    where = data.draw(st.integers(0, header - 1))
    byte = data.draw(st.integers(0, 255))
    damaged = whole[:where] + bytes([byte]) + whole[where + 1 :]
    (source / "model.safetensors").write_bytes(damaged)
    try:
        load(source)
    except CheckpointError as error:
        assert str(source) in str(error)  # noqa: PT017


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]},
        {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]},
        {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]},
        {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]},
        {"dtype": "F32", "shape": [1]},
        "F32",
    ],
)
def test_a_nonsensical_header_is_named(tmp_path: Path, entry: object) -> None:
    path = tmp_path / "model.safetensors"
    header = json.dumps({"w": entry}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        read_header(path)


def test_a_header_nested_too_deeply_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes((100_000).to_bytes(8, "little") + b"[" * 100_000)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        read_header(path)


def test_a_failing_read_stops_the_loading(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    source = folder()

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("os.preadv", fail)
    with pytest.raises(CheckpointError, match=r"cannot read tensor .*Input/output error"):
        load(source)


def test_loading_leaves_the_number_of_operator_threads_alone(folder: Folder) -> None:
    source = folder()
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        load(source)
        assert torch.get_num_threads() == 3
        with ThreadPoolExecutor(1) as later:
            assert later.submit(torch.get_num_threads).result() == 3
    finally:
        torch.set_num_threads(before)


# Random weights


def random_masters(seed: int, **choices: Any) -> tuple[Masters, dict[str, torch.Tensor]]:
    config = tiny_config(**{"variant": "qwen2", **choices})
    spec = model_spec(config)
    masters = empty_masters(spec)
    init_random(config, spec, masters, seed)
    assert not padding(spec, masters).any()
    return masters, dict(joined(spec, masters))


@pytest.mark.usefixtures("small_pieces")
def test_random_weights_follow_the_scheme_of_transformers() -> None:
    _, ours = random_masters(3, initializer_range=0.05, pad_token_id=17)
    for key, values in ours.items():
        if key.endswith("bias"):
            assert not values.any(), key
        elif "norm" in key:
            assert torch.all(values == 1), key
        elif key == EMBED_KEY:
            assert not values[17].any()
            assert (values == 0).all(dim=1).sum() == 1
        if values.dim() == 2:
            spread = values.std() / 0.05
            assert 1 - 4 / values.numel() ** 0.5 < spread < 1 + 4 / values.numel() ** 0.5, key
            assert values.mean().abs() < 4 * 0.05 / values.numel() ** 0.5, key
            assert values.abs().max() > 0.1, key


@pytest.mark.usefixtures("small_pieces")
def test_random_norms_that_are_stored_less_one_are_zero() -> None:
    _, ours = random_masters(3, variant="gemma2")
    norms = [values for key, values in ours.items() if "norm" in key]
    assert len(norms) == 4 * 3 + 1
    assert not any(values.any() for values in norms)


@pytest.mark.usefixtures("small_pieces")
def test_random_weights_depend_on_seed_and_name_alone() -> None:
    masters, ours = random_masters(3)
    again, _ = random_masters(3)
    assert all(torch.equal(again[u][half], masters[u][half]) for u in masters for half in (0, 1))
    _, other_seed = random_masters(4)
    _, fewer_layers = random_masters(3, num_hidden_layers=1)
    matrices = {key: values for key, values in ours.items() if values.dim() == 2}
    for key, values in matrices.items():
        assert not torch.equal(values, other_seed[key])
    assert all(torch.equal(values, ours[key]) for key, values in fewer_layers.items())
    heads = [values.flatten()[:1000] for values in matrices.values()]
    assert not any(torch.equal(a, b) for i, a in enumerate(heads) for b in heads[:i])
    long = ours[EMBED_KEY].flatten()
    assert not torch.equal(long[:1000], long[1000:2000])  # no piece repeats another


# Output that cannot be written


def test_an_unusable_output_is_refused_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_output(tmp_path / "deeply" / "new")
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(CheckpointError, match=r"full is not empty: give another"):
        check_output(tmp_path / "full")
    with pytest.raises(CheckpointError, match="is not a folder"):
        check_output(tmp_path / "full" / "x")
    with pytest.raises(CheckpointError, match=r"cannot be created in .*x \(Not a directory\)"):
        check_output(tmp_path / "full" / "x" / "out")
    with pytest.raises(CheckpointError, match="cannot be created in /proc"):
        check_output(Path("/proc/out"))
    monkeypatch.setattr(Path, "is_mount", lambda self: self == tmp_path / "empty")
    with pytest.raises(CheckpointError, match="mount point"):
        check_output(tmp_path / "empty")


def test_a_full_disk_is_noticed_before_writing(
    folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = folder()
    masters, stored = load(source)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10**9, 10**9, 12345))
    needed = 4 * model_spec(read_model_config(source)).param_count / 2**20
    message = f"out: it needs {needed:.1f} MiB, free are 0.0 MiB"
    with pytest.raises(CheckpointError, match=message):
        write(source, tmp_path / "out", masters, stored)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_that_fails_midway_leaves_nothing(
    folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    source = folder()
    masters, stored = load(source)
    calls = []

    def fail(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 2:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr("os.fsync", fail)
    message = "cannot write checkpoint.*out" if number == errno.EIO else "no room for.*out.*free"
    with pytest.raises(CheckpointError, match=message):
        write(source, tmp_path / "out", masters, stored)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_writer_left_by_an_exception_leaves_nothing(folder: Folder, tmp_path: Path) -> None:
    source = folder()
    masters, stored = load(source)
    spec = model_spec(read_model_config(source))

    def interrupted() -> None:
        with HuggingFaceWriter(source, tmp_path / "out", spec, masters, stored) as writer:
            writer.write_unit("L00")
            assert len(list(tmp_path.iterdir())) == 2
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_the_output_appears_whole(folder: Folder, tmp_path: Path) -> None:
    source = folder()
    masters, stored = load(source)
    spec = model_spec(read_model_config(source))
    with HuggingFaceWriter(source, tmp_path / "out", spec, masters, stored) as writer:
        for unit in spec.units:
            assert not (tmp_path / "out").exists()
            writer.write_unit(unit.name)
        assert not (tmp_path / "out").exists()
        writer.finish()
        assert (tmp_path / "out" / "config.json").exists()


def test_finished_weights_survive_a_taken_output(
    folder: Folder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = folder()
    masters, stored = load(source)
    spec = model_spec(read_model_config(source))
    output = tmp_path / "out"
    (tmp_path / "out-1").touch()
    with HuggingFaceWriter(source, output, spec, masters, stored) as writer:
        for unit in spec.units:
            writer.write_unit(unit.name)
        output.mkdir()
        (output / "notes.txt").write_text("mine")
        found = writer.finish()
    assert found == tmp_path / "out-2"
    assert f"{output} is taken by now; what was to be saved there is {found}" in caplog.text
    assert [path.name for path in output.iterdir()] == ["notes.txt"]
    saved = AutoModelForCausalLM.from_pretrained(found).state_dict()
    original = AutoModelForCausalLM.from_pretrained(source).state_dict()
    assert all(torch.equal(saved[key], original[key]) for key in original)


def test_a_source_that_vanished_is_named(folder: Folder, tmp_path: Path) -> None:
    source = folder()
    masters, stored = load(source)
    spec = model_spec(read_model_config(source))
    shutil.rmtree(source)
    with HuggingFaceWriter(source, tmp_path / "out", spec, masters, stored) as writer:
        for unit in spec.units:
            writer.write_unit(unit.name)
        with pytest.raises(CheckpointError, match=r"source had no config\.json"):
            writer.finish()
    assert not list(tmp_path.iterdir())


def test_float16_is_not_saved_with_overflow(folder: Folder, tmp_path: Path) -> None:
    source = folder()
    masters, _ = load(source)
    hi, lo = masters["norm"]
    split_master(torch.tensor([70000.0]), hi[5:6], lo[5:6])
    spec = model_spec(read_model_config(source))
    writer = HuggingFaceWriter(source, tmp_path / "out", spec, masters, torch.float16)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight.*7e\+04.*float16"):
        writer.write_unit("norm")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    write(source, tmp_path / "out", masters, torch.float32)
