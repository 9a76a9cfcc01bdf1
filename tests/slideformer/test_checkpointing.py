"""A run that goes on from a checkpoint ends in the same bits, under whatever plan it goes on."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig

from slideformer import filling
from slideformer.checkpointing import MODEL_FOLDER, Checkpoint
from slideformer.engine import Engine
from slideformer.graph.errors import CheckpointError, SlideFormerError
from slideformer.runtime.checkpoints import MANIFEST
from slideformer.runtime.policies import make_policy, policy_names
from tests.support.engines import (
    config_for,
    different,
    engine_with,
    make_batch,
    state_of,
    stored_weights,
    write_model,
)
from tests.support.policies import AtRandom

LAYERS = 3
UNITS = ("embed", "L00", "L01", "L02", "norm", "head")
BATCHES = [make_batch(0), make_batch(1, lengths=[16, 7, 0, 12]), make_batch(2), make_batch(3)]


@pytest.fixture(scope="module")
def disks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two folders to stripe over."""
    return tmp_path_factory.mktemp("disk"), tmp_path_factory.mktemp("disk")


@dataclass(frozen=True)
class Model:
    """A model folder and what it becomes without interruption."""

    folder: Path
    plain: dict[str, Tensor]


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = write_model(tmp_path_factory.mktemp("model"), "qwen2", tied=bool(request.param))
    with engine_with(config_for(folder, compute="bf16", weight_decay=0.1)) as engine:
        for batch in BATCHES:
            engine.step(batch)
        return Model(folder, state_of(engine))


def run(
    model: Path,
    batches: Sequence[Any],
    output: Path | None = None,
    start: Checkpoint | None = None,
    *,
    policy: str = "fifo",
    threads: int = 1,
    nvme: tuple[Path, ...] = (),
    **plan: Any,
) -> dict[str, Tensor]:
    """Train from the model or a checkpoint, write one after the first batch and go on meanwhile."""
    config = config_for(model, compute="bf16", weight_decay=0.1, threads=threads, nvme=nvme)
    chosen = AtRandom(plan.get("seed", 0)) if policy == "at-random" else make_policy(policy)
    with engine_with(config, policy=chosen, checkpoint=start, **plan) as engine:
        engine.step(batches[0])
        pending = engine.checkpoint(output) if output else None
        for batch in batches[1:]:
            engine.step(batch)
        if pending is not None:
            assert pending.finish() == output
        return state_of(engine)


@st.composite
def placements(draw: st.DrawFn, disks: tuple[Path, Path]) -> dict[str, Any]:
    """All that decides where and when, and nothing that decides rounding."""
    nvme = draw(st.booleans())
    resident = draw(st.frozensets(st.sampled_from(UNITS[:1] if nvme else UNITS)))
    moments = draw(st.integers(1, LAYERS)) if nvme else 0
    return {
        "policy": draw(st.sampled_from([*policy_names(), "at-random"])),
        "threads": draw(st.integers(1, 2)),
        "window": draw(st.integers(2, 4)),
        "chunk_numel": draw(st.sampled_from([500, 3000, 1 << 25])),
        "gradient_slots": draw(st.integers(0, 2)),
        "resident": resident,
        "nvme": disks[: draw(st.integers(1, 2))] if nvme else (),
        "snapshot": draw(st.booleans()),
        "nvme_moments": moments,
        "nvme_lo": (lo := draw(st.integers(0, moments))),
        "nvme_hi": draw(st.integers(0, lo)),
        "seed": draw(st.integers(0, 99)),
    }


@settings(max_examples=4)
@given(data=st.data())
def test_a_resumed_run_has_the_same_bits_under_any_placement(
    model: Model,
    disks: tuple[Path, Path],
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
) -> None:
    folder = tmp_path_factory.mktemp("runs")
    resident = st.just(None) if "head.hi" in model.plain else st.just("head")
    left_out = data.draw(resident)

    def placement() -> dict[str, Any]:
        drawn = data.draw(placements(disks))
        return {**drawn, "resident": drawn["resident"] - {left_out}}

    whole = run(model.folder, BATCHES, folder / "one", **placement())
    assert different(whole, model.plain) == [], "writing a checkpoint changes nothing"
    one = Checkpoint(folder / "one")
    assert one.info.step == 1
    resumed = run(model.folder, BATCHES[1:], folder / "two", one, **placement())
    assert different(resumed, model.plain) == []
    again = run(model.folder, BATCHES[2:], None, Checkpoint(folder / "two"), **placement())
    assert different(again, model.plain) == []
    assert sorted(path.name for path in folder.iterdir()) == ["one", "two"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def saved(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint after two steps."""
    output = tmp_path_factory.mktemp("checkpoints") / "step-2"
    with Engine(config_for(folder)) as engine:
        for batch in BATCHES[:2]:
            engine.step(batch)
        engine.checkpoint(output).finish({"notes.txt": "a note"}, {"data": 7})
    return output


def test_a_checkpoint_says_what_it_holds(saved: Path, folder: Path) -> None:
    checkpoint = Checkpoint(saved)
    assert checkpoint.info.step == 2
    assert checkpoint.info.training == {"data": 7}
    assert checkpoint.text("notes.txt") == "a note"
    with Engine(config_for(folder), checkpoint=checkpoint) as engine:
        assert engine.numerics == checkpoint.info.numerics
        assert engine.step(BATCHES[2]).number == 3
    with pytest.raises(CheckpointError, match=r"step-2 has no metrics\.jsonl"):
        checkpoint.text("metrics.jsonl")


def test_a_resumed_run_keeps_the_numerics_of_its_plan(folder: Path, tmp_path: Path) -> None:
    with engine_with(config_for(folder), micro_rows=1, vocab_chunks=3, head_tile=5) as engine:
        engine.step(BATCHES[0])
        engine.checkpoint(tmp_path / "c").finish()
    config = config_for(folder, micro_batch=None)
    with Engine(config) as engine:
        assert (engine.plan.vocab_chunks, engine.plan.head_tile) != (3, 5)
    with Engine(config, checkpoint=Checkpoint(tmp_path / "c")) as engine:
        plan = engine.plan
        assert (plan.micro_rows, plan.vocab_chunks, plan.head_tile) == (1, 3, 5)


def test_a_run_that_is_not_resumed_ends_in_other_bits(model: Model) -> None:
    """So that equal bits mean something: the moments count, not only the weights."""
    assert different(run(model.folder, BATCHES[1:]), model.plain)


def test_the_export_of_a_checkpoint_is_what_a_save_then_would_be(
    saved: Path, folder: Path, tmp_path: Path
) -> None:
    with Engine(config_for(folder)) as engine:
        for batch in BATCHES[:2]:
            engine.step(batch)
        engine.save(tmp_path / "saved")
    assert Checkpoint(saved).export(tmp_path / "exported") == tmp_path / "exported"
    exported = sorted(path.name for path in (tmp_path / "exported").iterdir())
    assert exported == sorted(path.name for path in (tmp_path / "saved").iterdir())
    for name in exported:
        ours, theirs = (tmp_path / each / name for each in ("exported", "saved"))
        assert ours.read_bytes() == theirs.read_bytes(), name
    assert stored_weights(tmp_path / "exported")


def test_with_a_snapshot_steps_do_not_wait_for_the_disk(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, free = os.pwrite, threading.Event()

    def stuck(*arguments: Any) -> int:
        assert free.wait(60)
        return write(*arguments)

    monkeypatch.setattr(os, "pwrite", stuck)
    with engine_with(config_for(folder), snapshot=True) as engine:
        engine.step(BATCHES[0])
        pending = engine.checkpoint(tmp_path / "c")
        for batch in BATCHES[1:]:
            engine.step(batch).wait()
        free.set()
        pending.finish()
        whole = state_of(engine)
    with engine_with(config_for(folder), checkpoint=Checkpoint(tmp_path / "c")) as engine:
        for batch in BATCHES[1:]:
            engine.step(batch)
        assert different(state_of(engine), whole) == []


# -- what is refused -----------------------------------------------------------------------------


def copied(saved: Path, target: Path) -> Path:
    for path in saved.rglob("*"):
        if path.is_file():
            (target / path.relative_to(saved)).parent.mkdir(parents=True, exist_ok=True)
            (target / path.relative_to(saved)).write_bytes(path.read_bytes())
    return target


@pytest.mark.parametrize("name", ["units/L01", "units/norm", f"{MODEL_FOLDER}/config.json"])
def test_a_truncated_file_is_refused_by_name(saved: Path, tmp_path: Path, name: str) -> None:
    path = copied(saved, tmp_path / "c") / name
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(CheckpointError, match=f"{name} is cut short"):
        Checkpoint(tmp_path / "c")


def test_an_altered_file_is_refused_by_name(saved: Path, folder: Path, tmp_path: Path) -> None:
    path = copied(saved, tmp_path / "c") / "units/L01"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    threads = threading.active_count()
    checkpoint = Checkpoint(tmp_path / "c")
    with pytest.raises(CheckpointError, match="units/L01: bytes"):
        Engine(config_for(folder), checkpoint=checkpoint)
    assert threading.active_count() == threads
    path.write_bytes(path.read_bytes()[:-1] + bytes([content[-1] ^ 1]))
    checkpoint.export(tmp_path / "exported")  # its weights are sound again


@pytest.mark.parametrize("name", [f"{MODEL_FOLDER}/config.json", "notes.txt"])
def test_an_altered_companion_is_refused_by_name(saved: Path, tmp_path: Path, name: str) -> None:
    """It would go into exported folders, where a tokenizer decides what the model is told."""
    path = copied(saved, tmp_path / "c") / name
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=f"{name}: bytes 0–.* use another checkpoint"):
        Checkpoint(tmp_path / "c")


def test_another_model_is_refused_by_name(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filling, "fill", lambda *_: pytest.fail("filled"))
    other = write_model(tmp_path / "other", intermediate_size=112)
    with pytest.raises(
        CheckpointError, match=rf"step-2/{MANIFEST}: .* another model: its intermediate is"
    ):
        Engine(config_for(other), checkpoint=Checkpoint(saved))
    deeper = write_model(tmp_path / "deeper", num_hidden_layers=4)
    with pytest.raises(CheckpointError, match="its layers is 3, that of the model is 4"):
        Engine(config_for(deeper), checkpoint=Checkpoint(saved))


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"rms_norm_eps": 1e-3}, "norm_eps"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_parameters"),
    ],
)
def test_a_model_that_computes_otherwise_is_refused(
    saved: Path, folder: Path, tmp_path: Path, settings: dict[str, Any], name: str
) -> None:
    shutil.copytree(folder, tmp_path / "other")
    path = tmp_path / "other" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises(
        CheckpointError, match=rf"model/config.json: .* another model: its {name} is"
    ):
        Engine(config_for(tmp_path / "other"), checkpoint=Checkpoint(saved))


def test_a_checkpoint_replaces_the_one_of_that_name(saved: Path, folder: Path) -> None:
    output = saved.with_name("again")
    with Engine(config_for(folder)) as engine:
        engine.checkpoint(output).finish()
        engine.step(BATCHES[0])
        engine.checkpoint(output).finish()
    assert Checkpoint(output).info.step == 1
    assert sorted(path.name for path in saved.parent.iterdir()) == ["again", "step-2"]


# -- what goes wrong while writing ---------------------------------------------------------------


def test_a_disk_that_fills_leaves_the_run_alive_and_nothing_behind(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with Engine(config_for(folder)) as engine:
        engine.step(BATCHES[0])
        monkeypatch.setattr(os, "pwrite", full)
        pending = engine.checkpoint(tmp_path / "c")
        engine.step(BATCHES[1])
        with pytest.raises(CheckpointError, match=f"no room for checkpoint {tmp_path / 'c'}"):
            pending.finish()
        monkeypatch.undo()
        assert list(tmp_path.iterdir()) == []
        engine.step(BATCHES[2]).wait()
        engine.checkpoint(tmp_path / "c").finish()
    assert Checkpoint(tmp_path / "c").info.step == 3


def test_a_checkpoint_that_cannot_be_begun_leaves_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really = os.open

    def few_files(path: Any, flags: int, *mode: int, **more: Any) -> int:
        if flags & os.O_CREAT:
            raise OSError(24, "Too many open files")
        return really(path, flags, *mode, **more)

    with Engine(config_for(folder)) as engine:
        monkeypatch.setattr(os, "open", few_files)
        with pytest.raises(CheckpointError, match="Too many open files"):
            engine.checkpoint(tmp_path / "c")
        monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


def test_no_room_is_refused_before_anything_is_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from slideformer.models import aside

    monkeypatch.setattr(aside, "_HEADROOM", 1 << 60)
    with (
        Engine(config_for(folder)) as engine,
        pytest.raises(CheckpointError, match="no room for checkpoint"),
    ):
        engine.checkpoint(tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


def test_after_a_failed_step_nothing_is_written(folder: Path, tmp_path: Path) -> None:
    with Engine(config_for(folder, lr=1e30)) as engine:
        for batch in BATCHES[:2]:
            engine.step(batch)
        with pytest.raises(SlideFormerError):
            engine.checkpoint(tmp_path / "c").finish()
    assert list(tmp_path.iterdir()) == []


def test_an_aborted_checkpoint_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    with Engine(config_for(folder)) as engine:
        engine.checkpoint(tmp_path / "c").abort()
        engine.step(BATCHES[0]).wait()
    assert list(tmp_path.iterdir()) == []


def test_random_weights_without_a_folder_can_be_resumed(folder: Path, tmp_path: Path) -> None:
    shape = AutoConfig.from_pretrained(folder)
    config = config_for(tmp_path / "none")
    with Engine(config, initial=shape) as engine:
        engine.step(BATCHES[0])
        engine.checkpoint(tmp_path / "c").finish()
        engine.step(BATCHES[1])
        plain = state_of(engine)
    with Engine(config, initial=shape, checkpoint=Checkpoint(tmp_path / "c")) as engine:
        engine.step(BATCHES[1])
        assert different(state_of(engine), plain) == []
