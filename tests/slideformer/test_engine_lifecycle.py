"""What an engine does beside training right: handles, evaluation, saving, failures, and its end."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from slideformer import this_machine
from slideformer.engine import MAX_OPEN_STEPS, Engine
from slideformer.graph.errors import (
    BudgetError,
    CheckpointError,
    ConfigError,
    DataError,
    NonFiniteError,
    SlideFormerError,
    TaskError,
)
from slideformer.models.export import HuggingFaceWriter
from slideformer.runtime.policies import Fifo
from tests.support.engines import (
    MICRO_ROWS,
    ROWS,
    SEQ_LEN,
    config_for,
    different,
    engine_with,
    make_batch,
    state_of,
    stored_weights,
    too_far,
    weights_of,
    write_model,
)

NAN = 0x7FC0
"""The upper half of a master that is not a number."""


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    """Whatever a test does, its threads are gone in the end."""
    before = set(threading.enumerate())
    yield
    left = [t.name for t in threading.enumerate() if t not in before]
    assert not [name for name in left if name.startswith("slideformer")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied model with biases."""
    return write_model(tmp_path_factory.mktemp("engine") / "model", "llama-biases", tied=True)


@pytest.fixture
def engine(folder: Path) -> Iterator[Engine]:
    """An engine in BF16, as the planner plans it."""
    with Engine(config_for(folder, compute="bf16")) as made:
        yield made


# Handles


def test_handles_count_steps_and_tokens(engine: Engine) -> None:
    batch = make_batch(0, lengths=[16, 9, 2, 0])
    first, second = engine.step(batch), engine.step(make_batch(1))
    evaluation = engine.evaluate(batch)
    assert (first.number, second.number, evaluation.number) == (1, 2, 2)
    assert first.target_tokens == batch.target_tokens == 15 - 3 + 8 + 1
    assert first.real_tokens == 27
    second.wait()
    assert first.loss() != second.loss()
    assert first.loss() == first.loss()


def test_results_can_be_read_in_any_order(engine: Engine) -> None:
    handles = [engine.step(make_batch(seed)) for seed in range(4)]
    norms = [handle.gradient_norm() for handle in reversed(handles)]
    assert all(norm > 0 for norm in norms)
    assert len({handle.loss() for handle in handles}) == 4


def test_at_most_two_steps_are_open(engine: Engine) -> None:
    for seed in range(6):
        engine.step(make_batch(seed))
        assert len(engine._open) <= MAX_OPEN_STEPS


def test_an_evaluation_has_no_norm_to_wait_for(engine: Engine) -> None:
    handle = engine.evaluate(make_batch(0))
    with pytest.raises(SlideFormerError, match="an evaluation has no gradients"):
        handle.gradient_norm()
    assert handle.loss() > 0


def test_a_learning_rate_for_one_step(folder: Path) -> None:
    batches = [make_batch(seed) for seed in range(3)]

    def train(lr: float, *rates: float | None) -> dict[str, Tensor]:
        with Engine(config_for(folder, lr=lr)) as made:
            for batch, rate in zip(batches, rates, strict=True):
                made.step(batch, lr=rate)
            return state_of(made)

    given = train(0.5, 1e-3, 1e-3, 1e-3)
    assert different(given, train(1e-3, None, None, None)) == []
    assert different(given, train(1e-3, None, None, 0.0)) != []


def test_without_a_learning_rate_weights_stay_and_moments_move(engine: Engine) -> None:
    before = state_of(engine)
    engine.step(make_batch(0), lr=0.0)
    changed = different(before, state_of(engine))
    assert changed
    assert {name.rpartition(".")[2] for name in changed} == {"m", "v"}


def test_the_timeline_shows_every_task_of_the_last_steps(engine: Engine) -> None:
    for seed in range(3):
        engine.step(make_batch(seed))
    engine.synchronize()
    timeline = engine.timeline()
    names = sorted(task.name for task in engine.graph.tasks)
    for number in range(3):
        assert sorted(span.task for span in timeline.instance(number).spans) == names


# Batches that do not fit


def bad_batches() -> dict[str, tuple[Any, str]]:
    """Batches that no step can use, and what is said about them."""
    good = make_batch(0)
    short = replace(good, input_ids=good.input_ids[:2], targets=good.targets[:2])
    uneven = replace(good, targets=good.targets[:, :-1])
    silent = replace(good, targets=torch.full_like(good.targets, -100), target_tokens=0)
    foreign, negative, aim = (good.input_ids.clone() for _ in range(3))
    foreign[1, 2], negative[1, 2], aim[1, 2] = 301, -1, 999
    return {
        "fewer rows": (short, rf"\(2, {SEQ_LEN}\).*planned for \({ROWS}, {SEQ_LEN}\)"),
        "shorter targets": (uneven, rf"targets \({ROWS}, {SEQ_LEN - 1}\)"),
        "no target": (silent, "no target token"),
        "token id too high": (replace(good, input_ids=foreign), "token id 301.*0 to 300"),
        "token id negative": (replace(good, input_ids=negative), "token id -1.*0 to 300"),
        "target too high": (replace(good, targets=aim), "token id 999.*0 to 300"),
    }


@pytest.mark.parametrize("name", bad_batches())
def test_a_batch_that_does_not_fit_is_refused_and_is_no_step(name: str, folder: Path) -> None:
    bad, words = bad_batches()[name]
    states = []
    for disturb in (False, True):
        with Engine(config_for(folder)) as made:
            handles = []
            for seed in range(2):
                if disturb:
                    with pytest.raises(DataError, match=words):
                        made.step(bad)
                    with pytest.raises(DataError, match=words):
                        made.evaluate(bad)
                handles.append(made.step(make_batch(seed)))
            assert [handle.number for handle in handles] == [1, 2]
            states.append(state_of(made))
    assert different(*states) == []


# Evaluation


def test_an_evaluation_changes_nothing(engine: Engine) -> None:
    engine.step(make_batch(0))
    before = state_of(engine)
    losses = [engine.evaluate(make_batch(9)).loss() for _ in range(3)]
    assert different(before, state_of(engine)) == []
    assert len(set(losses)) == 1


@pytest.mark.parametrize("resident", [frozenset(), frozenset({"embed", "L01", "norm"})])
def test_an_evaluation_between_steps_sees_exactly_the_steps_before_it(
    folder: Path, resident: frozenset[str]
) -> None:
    config, probe = config_for(folder, compute="bf16", lr=1e-2), make_batch(9)

    def losses(pause: bool) -> list[float]:
        with engine_with(config, resident=resident) as made:
            handles = []
            for seed in range(3):
                handles.append(made.evaluate(probe))
                if pause:
                    made.synchronize()
                made.step(make_batch(seed))
                if pause:
                    made.synchronize()
            handles.append(made.evaluate(probe))
            return [handle.loss() for handle in handles]

    overlapped = losses(pause=False)
    assert overlapped == losses(pause=True)
    assert len(set(overlapped)) == 4


# Saving


@pytest.mark.parametrize("resident", [frozenset(), frozenset({"embed", "L00", "L02"})])
def test_a_save_between_steps_holds_exactly_the_steps_before_it(
    folder: Path, tmp_path: Path, resident: frozenset[str]
) -> None:
    compute = "bf16" if resident else "fp32"
    with engine_with(config_for(folder, compute=compute), resident=resident) as made:
        made.step(make_batch(0))
        made.save(tmp_path / "first")
        made.step(make_batch(1))
        made.step(make_batch(2))
        made.save(tmp_path / "second")
        final = state_of(made)
    with engine_with(config_for(folder, compute=compute), resident=resident) as made:
        made.step(make_batch(0))
        first = state_of(made)
        for seed in (1, 2):
            made.step(make_batch(seed))
        assert different(final, state_of(made)) == [], "saving does not change training"
    for name, state in (("first", first), ("second", final)):
        saved = stored_weights(tmp_path / name)
        assert too_far(saved, weights_from(made, state)) == []
        assert all(torch.equal(saved[k], v) for k, v in weights_from(made, state).items())


def weights_from(engine: Engine, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters in FP32, from bits that `state_of` returned."""
    bits = {
        unit.name: (state[f"{unit.name}.hi"].int() << 16) + state[f"{unit.name}.lo"].int()
        for unit in engine.spec.units
    }
    return {
        p.key: bits[u.name][p.offset : p.offset + p.numel].view(torch.float32).view(p.shape)
        for u in engine.spec.units
        for p in u.params
    }


def test_a_saved_model_generates_and_is_tied(engine: Engine, tmp_path: Path) -> None:
    engine.step(make_batch(0))
    engine.save(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tokens = model.generate(torch.tensor([[1, 5, 9]]), max_new_tokens=3, do_sample=False)
    assert tokens.shape == (1, 6)


def test_a_checkpoint_keeps_its_dtype(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    with Engine(config_for(tmp_path / "half", compute="bf16")) as made:
        made.step(make_batch(0))
        made.save(tmp_path / "out")
        weights = weights_of(made)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert saved.dtype is torch.bfloat16
    for name, value in saved.named_parameters():
        hi = (weights[name].view(torch.int32) + 0x8000) >> 16  # to nearest, ties away from zero
        assert torch.equal(value.view(torch.int16), hi.to(torch.int16)), name


def test_a_save_that_cannot_be_written_leaves_the_run_alive(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def full(self: HuggingFaceWriter, name: str) -> None:
        calls.append(name)
        raise CheckpointError("the disk is full")

    engine.step(make_batch(0))
    with monkeypatch.context() as patch:
        patch.setattr(HuggingFaceWriter, "write_unit", full)
        with pytest.raises(CheckpointError, match=r"^the disk is full$"):
            engine.save(tmp_path / "first")
    assert len(calls) == 1
    assert list(tmp_path.iterdir()) == [], "not half a checkpoint"
    engine.step(make_batch(1))
    engine.save(tmp_path / "second")
    saved = stored_weights(tmp_path / "second")
    assert all(torch.equal(saved[name], value) for name, value in weights_of(engine).items())


def test_a_folder_that_is_not_empty_is_refused_and_kept(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not empty"):
        engine.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    engine.save(tmp_path / "below")


# Failures


def spoil(engine: Engine, unit: str) -> None:
    """Make a weight of a unit not a number."""
    engine.synchronize()
    engine._memory.states[unit].hi[3] = NAN
    engine._memory.states[unit].lo[3] = 0


def unchanged(before: dict[str, Tensor], after: dict[str, Tensor], unit: str) -> bool:
    """Whether a unit's state is what it was."""
    mine = [name for name in before if name.startswith(f"{unit}.")]
    return not different({n: before[n] for n in mine}, {n: after[n] for n in mine})


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("micro_batch", [MICRO_ROWS, ROWS])
def test_a_gradient_that_is_not_finite_fails_the_step_and_names_the_task(
    tmp_path: Path, micro_batch: int, tied: bool
) -> None:
    folder = write_model(tmp_path / "model", "llama-biases", tied=tied)
    with engine_with(config_for(folder, compute="bf16"), micro_rows=micro_batch) as made:
        made.step(make_batch(0)).wait()
        spoil(made, "L01")
        before = raw_state(made)
        handle = made.step(make_batch(1))
        with pytest.raises(NonFiniteError, match=r"update\.\w+\.\w+#1: the gradient is not finite"):
            handle.wait()
        with pytest.raises(NonFiniteError, match=r"update\."):
            handle.gradient_norm()
        with pytest.raises(NonFiniteError, match=r"update\."):
            made.step(make_batch(2))
        with pytest.raises(NonFiniteError, match=r"update\."):
            made.evaluate(make_batch(2))
        for _ in range(2):
            with pytest.raises(NonFiniteError, match=r"update\."):
                made.synchronize()
        # Every gradient passes through the spoilt layer. Only rows that have none may change.
        changed = {name.partition(".")[0] for name in different(before, raw_state(made))}
        assert changed <= (set() if tied else {"embed"})
        with pytest.raises(CheckpointError, match=f"not saved; restart from {folder}"):
            made.save(tmp_path / "out")
        assert list(tmp_path.iterdir()) == [folder]


def raw_state(engine: Engine) -> dict[str, Tensor]:
    """`state_of` without waiting, as after a failure."""
    return {
        f"{name}.{part}": getattr(state, part).clone()
        for name, state in engine._memory.states.items()
        for part in ("hi", "lo", "m", "v")
    }


def test_a_save_right_behind_a_failing_step_is_refused(folder: Path, tmp_path: Path) -> None:
    """Before anybody has read that it failed."""
    with Engine(config_for(folder, compute="bf16")) as made:
        spoil(made, "L00")
        made.step(make_batch(0))
        with pytest.raises(CheckpointError, match="part old and part new") as raised:
            made.save(tmp_path / "out")
        assert isinstance(raised.value.__cause__, NonFiniteError)
        assert list(tmp_path.iterdir()) == []


def test_a_divergent_run_fails_at_the_step_that_diverges(folder: Path) -> None:
    with Engine(config_for(folder, compute="bf16", lr=1e30)) as made:
        first = made.step(make_batch(0))
        second = made.step(make_batch(1))
        assert first.gradient_norm() > 0
        with pytest.raises(NonFiniteError):
            second.wait()


def test_a_resident_unit_with_a_bad_gradient_fails_the_step_and_stays_as_it_was(
    folder: Path,
) -> None:
    units = frozenset({"embed", "L00", "L01", "L02", "norm"})
    with engine_with(config_for(folder, compute="bf16"), resident=units) as made:
        made.step(make_batch(0)).wait()
        spoil(made, "L01")
        before = raw_state(made)
        with pytest.raises(NonFiniteError, match=r"update\.norm\.c0: the gradient is not finite"):
            made.step(make_batch(1)).gradient_norm()
        after = raw_state(made)
        assert all(unchanged(before, after, f"L{i:02d}") for i in range(3))
        assert unchanged(before, after, "norm")


@pytest.mark.parametrize("handles", [0, 1])
def test_an_engine_closes_after_a_failure_nobody_has_read(folder: Path, handles: int) -> None:
    with Engine(config_for(folder, compute="bf16")) as made:
        spoil(made, "norm")
        kept = [made.step(make_batch(0))]
        del kept[handles:]


# The end


def test_a_closed_engine_can_be_closed_again_and_does_nothing_else(
    folder: Path, tmp_path: Path
) -> None:
    made = Engine(config_for(folder))
    made.close()
    made.close()
    attempts = (
        lambda: made.step(make_batch(0)),
        lambda: made.evaluate(make_batch(0)),
        lambda: made.save(tmp_path / "saved"),
        lambda: made.checkpoint(tmp_path / "checkpoint"),
    )
    for attempt in attempts:
        with pytest.raises(SlideFormerError, match=r"^the engine is closed; make a new one"):
            attempt()
    assert not any(entry.name != folder.name for entry in tmp_path.iterdir())


@pytest.mark.parametrize("lr", [float("nan"), float("inf"), -1e-5])
def test_a_rate_that_cannot_work_is_no_step(engine: Engine, lr: float) -> None:
    with pytest.raises(ConfigError, match=f"lr is {lr} for this step; give a finite number"):
        engine.step(make_batch(0), lr=lr)
    assert engine.step(make_batch(0)).number == 1


def test_deterministic_kernels_are_for_the_engine_alone(folder: Path) -> None:
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    with Engine(config_for(folder, deterministic=True)) as made:
        assert torch.are_deterministic_algorithms_enabled()
        made.step(make_batch(0)).wait()
    assert torch.are_deterministic_algorithms_enabled() is before
    assert torch.utils.deterministic.fill_uninitialized_memory is fill  # type: ignore[attr-defined]


def test_a_close_waits_for_open_steps(folder: Path) -> None:
    with Engine(config_for(folder)) as made:
        handles = [made.step(make_batch(seed)) for seed in range(2)]
    assert all(handle._done.done() for handle in handles)
    assert handles[1].gradient_norm() > 0


def test_a_closed_engine_holds_no_memory(folder: Path) -> None:
    with Engine(config_for(folder)) as made:
        handle = made.step(make_batch(0))
        handle.loss()
        maps = [weakref.ref(arena._map) for arena in made._memory.arenas._host.values()]
        assert maps
        assert all(mapped() is not None for mapped in maps)
    assert [mapped() for mapped in maps] == [None] * len(maps)
    assert made.steps == 1
    assert made.timeline().spans
    assert handle.gradient_norm() > 0


def test_a_gpu_that_no_call_reaches_any_more_does_not_hide_why(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    def train() -> None:
        with Engine(config_for(folder)) as made:
            monkeypatch.setattr(made, "_device", torch.device("cuda"))  # as far as its end goes
            raise TaskError("what failed the run")

    monkeypatch.setattr(torch.cuda, "empty_cache", fails)
    with pytest.raises(TaskError, match="what failed the run"):
        train()


@pytest.mark.parametrize(
    ("error", "break_it"),
    [
        (CheckpointError, lambda folder: (folder / "model.safetensors").unlink()),
        (CheckpointError, lambda folder: (folder / "config.json").write_text("{}[")),
    ],
)
def test_an_engine_that_cannot_begin_leaves_nothing(
    tmp_path: Path, error: type[Exception], break_it: Callable[[Path], object]
) -> None:
    folder = write_model(tmp_path / "model")
    break_it(folder)
    with pytest.raises(error):
        Engine(config_for(folder))


def test_a_sequence_longer_than_the_model_allows_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"seq_len is 65.*64"):
        Engine(config_for(folder, seq_len=65))


def test_a_budget_beyond_the_machine_is_not_planned_with(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What lies beyond it would be found out by the system, which kills without a word."""
    monkeypatch.setattr(this_machine, "host_memory", lambda: 2 << 20)
    with pytest.raises(BudgetError, match="no plan fits 2 MiB"):
        Engine(config_for(folder, cpu_memory="900GiB"))
    assert "cpu_memory is 900.00 GiB, but there are 2.00 MiB here" in caplog.text


def test_more_threads_than_cores_are_not_taken(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(this_machine, "usable_cores", lambda: 3)
    with Engine(config_for(folder, threads=3)) as made:
        made.step(make_batch(0))
    assert "cores" not in caplog.text
    with Engine(config_for(folder, threads=1000)) as made:
        made.step(make_batch(0))
    assert "threads is 1000, but this process may use 3 cores; updates take 3" in caplog.text


def test_an_engine_works_within_a_running_loop(folder: Path) -> None:
    """As in a notebook."""

    async def cell() -> float:
        with Engine(config_for(folder)) as made:
            return made.step(make_batch(0)).loss()

    assert asyncio.run(cell()) > 0


def test_a_policy_of_ones_own(folder: Path) -> None:
    taken: list[str] = []

    class Noting(Fifo):
        name = "noting"

        def choose(self, lane: Any, ready: Any) -> Any:
            taken.append(ready[0].task.name)
            return ready[0]

    with Engine(config_for(folder), policy=Noting()) as made:
        made.step(make_batch(0)).wait()
        assert sorted(taken) == sorted(task.name for task in made.graph.tasks)
