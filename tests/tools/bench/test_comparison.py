"""The benchmark: every path on tiny shapes and the CPU, its judgement on made-up figures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer import Typer
from typer.testing import CliRunner

from slideformer.graph.errors import ConfigError
from slideformer.graph.serialise import from_json
from slideformer.graph.step import compile_step
from slideformer.measuring import overhead
from slideformer.measuring.floors import compute_seconds, floors_of_step
from slideformer.measuring.stand_in import Arithmetic
from slideformer.models import layer
from slideformer.runtime.policies import policy_names
from slideformer.tools.bench import comparison, loss_check
from slideformer.tools.bench import overhead as bench_overhead
from slideformer.tools.bench.baseline import RECIPES, Baseline
from slideformer.tools.bench.comparison import Comparison, measure
from slideformer.tools.bench.floors import Floors
from slideformer.tools.bench.ours import Ours
from slideformer.tools.bench.report import floors_report, machine, summary, table
from slideformer.tools.bench.rows import Row, Turns, parse_row
from slideformer.tools.bench.worker import Worker, WorkerError
from slideformer.tools.bench_cli import bench
from slideformer.tools.view_cli import read_trace
from tests.support.specs import small_plan, small_spec

BUDGETS = {"gpu_memory": "2GiB", "cpu_memory": "4GiB"}
TINY = {"shape": "tiny", "batch_size": 2, "seq_len": 16, **BUDGETS}
TURNS = Turns(pairs=1, steps=2, warmup=1)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """More threads than idle cores make tiny operations a hundred times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class InProcess(Worker):
    """A worker without the process, so that a test need not wait for imports."""

    def __init__(self, contestant: str) -> None:
        self.name = contestant.rpartition(":")[2]
        self._subject: Any = {"Ours": Ours, "Baseline": Baseline, "Floors": Floors}[self.name]()

    @property
    def pid(self) -> int:
        return os.getpid()

    def ask(self, method: str, **arguments: Any) -> Any:
        return json.loads(json.dumps(getattr(self._subject, method)(**arguments)))

    def close(self) -> None:
        if isinstance(self._subject, Ours):
            self._subject.release()


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "Worker", InProcess)
    monkeypatch.setattr(loss_check, "Worker", InProcess)


# -- the two sides ---------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_baseline_trains_as_its_recipe_says(recipe: str) -> None:
    baseline = Baseline()
    baseline.hello("cpu")
    baseline.prepare(recipe, "tiny", 2, 16, 2)
    baseline._lr = 1e-2
    first = baseline.losses()
    again = baseline.losses()
    assert len(first) == len(again) == 4
    if RECIPES[recipe].optimizer:
        share = 0.99 if RECIPES[recipe].adapters else 0.95  # they are few
        assert sum(again) < share * sum(first)
    else:
        assert again == first
    calls: list[int] = []
    baseline._model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    baseline._step(0)
    passes = baseline._layers if RECIPES[recipe].one_layer else 1
    assert len(calls) == passes * (2 if RECIPES[recipe].recompute else 1)
    assert baseline.run(steps=1, warmup=1)["step_seconds"] > 0
    baseline.release()
    assert baseline.losses() == first  # built anew, with the same weights


def test_masters_keep_what_bf16_rounds_away() -> None:
    losses = {}
    for recipe in ("R1", "R2"):
        baseline = Baseline()
        baseline.hello("cpu")
        baseline.prepare(recipe, "tiny", 2, 16, 2)
        baseline._lr = 1e-6  # far below half a unit in the last place of most weights
        baseline.losses()
        before = [p.clone() for p in baseline._model.parameters()]
        for _ in range(5):
            baseline.losses()
        after = baseline._model.parameters()
        losses[recipe] = sum(int((a != b).sum()) for a, b in zip(before, after, strict=True))
    assert losses["R2"] > 2 * losses["R1"]


def test_ours_reports_its_plan_and_traffic() -> None:
    ours = Ours()
    assert ours.hello("cpu")["device"] == "cpu"
    built = ours.build("tiny", parse_row("tiny", TINY).engine_settings())
    assert built["parameters"] == 320 * 64 + 2 * (64 * (64 + 2 * 32 + 64 + 3 * 128) + 128) + 64
    matrices = 2 * 64 * (64 + 2 * 32 + 64 + 3 * 128)
    assert built["traffic"]["compute"]["flops"] > 6 * 32 * matrices  # 32 tokens, both directions
    assert built["traffic"]["cpu"]["tasks"] > 0
    assert built["plan"]["micro_rows"] in (1, 2)
    assert 0 < built["plan"]["gpu_peak"] <= 2 << 30
    turn = ours.run(steps=2, warmup=1)
    assert len(turn["each"]) == 2
    assert turn["step_seconds"] == pytest.approx(sum(turn["each"]) / 2)
    engine = weakref.ref(ours._engine)
    ours.release()
    assert engine() is None  # nothing keeps its memory


def test_a_whole_row_with_floors_and_trace(in_process: None, tmp_path: Path) -> None:
    result = measure(Row(**TINY), TURNS, "cpu", floors=True, trace=tmp_path)
    assert "error" not in result
    found = summary(result)
    assert found["ours"] == pytest.approx(32 / result["ours"][0]["step_seconds"])
    assert found["ratio"] == pytest.approx(found["ours"] / found["theirs"])
    assert result["host_kind"] == "PSS"
    assert result["host_peak"] > 50 << 20
    floors = result["floors"]["floors"]
    assert floors["compute"] == result["floors"]["compute"]["step_seconds"] > 0
    assert set(result["floors"]["updates"]["seconds"]) >= {
        "adamw",
        "adamw8",
        "stream",
        "torch_casts",
    }
    assert any("highest floor" in line for line in floors_report(result["floors"], 1.0))
    graph = from_json((tmp_path / "step.json").read_bytes())
    measured = read_trace(tmp_path / "trace.json", graph)
    assert {"fwd.L00.m0", "bwd.L01.m0"} <= {span.task for span in measured.spans}
    assert "busy: compute" in result["trace_report"][0]
    assert len(list(table({"machine": machine(), "rows": [result]}))) <= 25


def test_floors_follow_from_traffic() -> None:
    traffic = {
        "h2d": {"nbytes": 60.0, "params": 0},
        "d2h": {"nbytes": 40.0, "params": 0},
        "cpu": {"nbytes": 0, "params": 10.0},
    }
    copies = {"h2d": 30.0, "d2h": 10.0, "both": 25.0}
    updates = {
        "params_per_second": {"adamw": 10.0, "adamw_busy": 5.0},
        "stream_bytes_per_second": 36.0,
    }
    assert floors_of_step(traffic, copies, updates, 3.0) == {
        "compute": 3.0,
        "h2d": 2.0,
        "d2h": 4.0,
        "both_ways": 4.0,
        "update": 2.0,
        "host_memory": 10.0,
    }
    alone = floors_of_step({"compute": traffic["cpu"]}, copies, updates, 3.0)
    assert max(alone.values()) == alone["compute"]  # all on the GPU: nothing else to wait for


def test_the_arithmetic_floor_keeps_what_the_plan_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[bool] = []

    def spy(name: str) -> None:
        real = getattr(layer, name)

        def call(*args: Any, **named: Any) -> Any:
            kept.append(named["kept"] is not None)
            return real(*args, **named)

        monkeypatch.setattr(layer, name, call)

    spy("forward")
    spy("backward")
    sizes = Arithmetic(rows=4, seq_len=16, micro_rows=2, head_tile=32, compute="fp32", kept=1)
    found = compute_seconds("tiny", sizes, torch.device("cpu"), 1)
    assert found["step_seconds"] > 0
    step = [False, False, True, True]  # layers forwards, two micro-batches each, then backwards
    assert kept[:8] == [*step, *reversed(step)]


class Scripted:
    """A worker that answers from a script and notes what it was asked."""

    log: list[str]

    def __init__(self, contestant: str) -> None:
        self.name = contestant.rpartition(":")[2]
        self.pid = os.getpid()
        self._runs = 0

    def ask(self, method: str, **arguments: Any) -> Any:
        self.log.append(f"{self.name}.{method}")
        if self.name == "Baseline" and method == "run":
            self._runs += 1
            if self._runs == 1:
                raise WorkerError("no memory", out_of_memory=True)
        seconds = 2.0 if self.name == "Baseline" else 1.0
        answer = {"device": "cpu", "gpu": None, "liger": None, "step_seconds": seconds}
        return {**answer, "plan": {"micro_rows": 2}}

    def close(self) -> None:
        self.log.append(f"{self.name}.close")


def test_what_does_not_fit_together_takes_turns(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    log: list[str] = []
    Scripted.log = log
    monkeypatch.setattr(comparison, "Worker", Scripted)
    monkeypatch.setattr(comparison, "_read_trace", str)
    monkeypatch.setattr(comparison, "trace_report", lambda read, steps: [read])
    result = measure(Row(**TINY), Turns(pairs=2), "cpu", trace=tmp_path)
    assert result["trace_report"] == [str(tmp_path)]
    assert result["sharing"].startswith("in turn")
    assert result["summary"]["ratio"] == 2.0
    start = log.index("Baseline.release") + 1
    turn = ["Ours.run", "Ours.release", "Baseline.run", "Baseline.release"]
    last = [turn[0], "Ours.trace", *turn[1:]]  # while there still is an engine
    assert log[start:] == [*turn, "Ours.build", *last, "Ours.close", "Baseline.close"]


def test_a_failing_row_is_told_and_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(Scripted):
        def ask(self, method: str, **arguments: Any) -> Any:
            if method == "build":
                raise WorkerError("Ours.build: too small")
            return super().ask(method, **arguments)

    Scripted.log = []
    monkeypatch.setattr(comparison, "Worker", Failing)
    result = measure(Row(**TINY), TURNS, "cpu", floors=True)
    assert result["error"] == "Ours.build: too small"
    assert Scripted.log[-2:] == ["Ours.close", "Baseline.close"]


# -- losses ----------------------------------------------------------------------------------------


def test_losses_follow_r2_and_a_frozen_model_is_noticed(in_process: None) -> None:
    size = loss_check.Size(64, 128, 2, 4, batch_size=4, seq_len=64, steps=20, lr=4e-3)
    settings = {"gpu_memory": "2GiB", "cpu_memory": "4GiB"}
    trained = loss_check.check_losses("cpu", settings, size=size)
    assert trained["passed"], trained
    frozen = loss_check.check_losses("cpu", settings, size=size, frozen=True)
    assert not frozen["passed"]
    assert abs(frozen["fall"]) < 0.05
    assert frozen["theirs"] == trained["theirs"]


@pytest.mark.parametrize(
    ("ours", "passed"),
    [([5.0, 3.9], True), ([5.0, 4.1], False), ([5.0, 3.95], False), ([5.06, 3.9], False)],
)
def test_judgement(ours: list[float], passed: bool) -> None:
    theirs = [5.0, 4.1] if ours == [5.0, 4.1] else [5.0, 3.9]
    assert loss_check.judge(ours, theirs)["passed"] is passed


# -- the scheduler ---------------------------------------------------------------------------------


def test_what_deciding_costs_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    small = compile_step(small_spec(), small_plan())
    monkeypatch.setattr(overhead, "large_step", lambda: small)
    found = bench_overhead.decision_costs("cpu")
    assert found["policies"].keys() == set(policy_names())
    for each in found["policies"].values():
        assert each["per_task"] == pytest.approx(each["loop_seconds"] / (3 * len(small.tasks)))
        each["per_task"] = 2e-5
    lines = list(table({"machine": machine(), "rows": [], "scheduler": found}))
    assert f"scheduler on cpu: {len(small.tasks)} tasks" in lines[-len(policy_names()) - 1]
    assert "fifo                20.0 µs" in "\n".join(lines)

    slow = overhead.Overhead(tasks=10, seconds=1.0, loop_seconds=6e-4)
    monkeypatch.setattr(overhead, "scheduler_overhead", lambda *_: {"slow": slow})
    assert not bench_overhead.decision_costs("cpu")["passed"]


def test_the_large_step_has_thousands_of_tasks() -> None:
    assert len(overhead.large_step().tasks) > 5000


# -- the command -----------------------------------------------------------------------------------


def test_the_command_measures_in_processes_of_their_own(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "slideformer.tools.bench_cli", "--device", "cpu"]
    rows = ["--row", "tiny:2:2GiB:4GiB:R1:seq_len=16", "--row", "giant:2:2GiB:4GiB:none"]
    where = ["--json", str(tmp_path / "all.json"), "--trace", str(tmp_path / "traces")]
    done = subprocess.run(
        [*command, *rows, *where, "--pairs", "1", "--steps", "1", "--warmup", "1"],
        cwd=Path(comparison.__file__).resolve().parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr  # the second row cannot work, the first must
    good, bad = json.loads((tmp_path / "all.json").read_text())["rows"]
    assert "error" not in good
    assert good["summary"]["ours"] > 0
    assert good["summary"]["theirs"] > 0
    assert "unknown shape 'giant'" in bad["error"]
    assert "unknown shape 'giant'" in done.stdout
    assert "Traceback" not in done.stderr
    written = sorted(path.relative_to(tmp_path) for path in tmp_path.glob("traces/*/*"))
    assert written == [Path("traces/row1/step.json"), Path("traces/row1/trace.json")]


def test_flags_that_make_no_sense_are_refused() -> None:
    app = Typer()
    app.command()(bench)
    done = CliRunner().invoke(app, ["--frozen"])
    assert isinstance(done.exception, ConfigError)
    done = CliRunner().invoke(app, ["--set", "window"])
    assert "not name=value" in str(done.exception)


def test_a_worker_that_dies_is_an_error_of_its_row() -> None:
    worker = Worker("os:_exit")  # made without its argument it only fails; called, it ends
    with pytest.raises(WorkerError, match="TypeError"):
        worker.ask("hello")
    worker._process.kill()
    worker._process.wait()
    with pytest.raises(WorkerError, match="ended with code -9"):
        worker.ask("hello")
    worker.close()


def test_the_command_line_needs_no_torch() -> None:
    program = "import sys; sys.modules['torch'] = None; import slideformer.tools.bench_cli"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(comparison.__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_comparison_needs_no_baseline(in_process: None) -> None:
    compared = Comparison(Row(**TINY, baseline="none"), TURNS, "cpu", None)
    result = compared.run()
    compared.close()
    assert result["theirs"] == []
    assert "ratio" not in summary(result)
