"""The commands on graphs, from their flags to what they print and how they exit."""

from __future__ import annotations

import json
from pathlib import Path

import networkx as nx
import pytest
from transformers import AutoConfig
from typer.testing import CliRunner, Result

from slideformer.config import EngineConfig
from slideformer.graph.buffers import Tier
from slideformer.graph.builder import GraphBuilder
from slideformer.graph.errors import BudgetError, ConfigError, GraphError, SlideFormerError
from slideformer.graph.plan import Budgets
from slideformer.graph.profile import MachineProfile
from slideformer.graph.serialise import from_json, to_json
from slideformer.graph.step import compile_step
from slideformer.graph.tasks import TaskKind
from slideformer.models.units import model_spec
from slideformer.planning import plan_for
from slideformer.runtime.memory_aware import MemoryAware
from slideformer.tools.graph_cli import graph_app
from slideformer.tools.simulate_cli import INSTANCES, policies_app
from tests.models.tiny import tiny_config
from tests.support.specs import small_plan, small_spec


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but a config."""
    folder = tmp_path_factory.mktemp("model")
    tiny_config().save_pretrained(folder)
    return folder


@pytest.fixture
def step(tmp_path: Path) -> Path:
    """The graph of a small step in a file."""
    path = tmp_path / "step.json"
    path.write_text(to_json(compile_step(small_spec(), small_plan())))
    return path


def call(*args: str | Path) -> Result:
    """Run a ``graph`` command; errors of the package are left to the caller."""
    result = CliRunner().invoke(graph_app, [str(arg) for arg in args])
    if isinstance(result.exception, SlideFormerError):
        raise result.exception
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


FLAGS = ("--gpu-memory", "3GiB", "--cpu-memory", "3GiB", "--batch-size", "4", "--seq-len", "16")


def test_dump_writes_the_graph_that_an_engine_would_run(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "step.json"
    more = ("--micro-batch", "2", "--window", "2", "--packing", "--compute", "fp32")
    call("dump", "--model", model, *FLAGS, *more, "-o", path)
    config = EngineConfig(
        model=model,
        batch_size=4,
        seq_len=16,
        micro_batch=2,
        window=2,
        packing=True,
        compute="fp32",
    )
    hf_config = AutoConfig.from_pretrained(model)
    plan = plan_for(hf_config, config, Budgets(3 << 30, 3 << 30), MachineProfile())
    assert from_json(path.read_text()) == compile_step(model_spec(hf_config), plan)
    assert [p.name for p in tmp_path.iterdir()] == ["step.json"]


def test_dump_for_a_named_machine_and_in_every_format(model: Path, tmp_path: Path) -> None:
    texts = {
        form: call("dump", "--model", model, *FLAGS, "--machine", "rtx3090", "--format", form)
        for form in ("json", "dot", "graphml", "text")
    }
    graph = from_json(texts["json"].stdout)
    (tmp_path / "g").write_text(texts["graphml"].stdout)
    assert list(nx.read_graphml(tmp_path / "g").nodes) == [t.name for t in graph.tasks]
    assert texts["dot"].stdout.count("->") == sum(map(len, graph.edges.predecessors))
    assert texts["text"].stdout.startswith(f"graph step: {len(graph.tasks)} tasks")


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((), ConfigError, "give either --model"),
        (("--model", ".", "--shape", "llama3-8b"), ConfigError, "give either --model"),
        (("--shape", "lama3-8b"), ConfigError, "did you mean llama3-8b"),
        (("--shape", "llama3-8b", "--machine", "h20"), ConfigError, "did you mean h200"),
        (("--shape", "llama3-8b", "--batch-size", "0"), ConfigError, "--batch-size: batch_size is"),
        (("--shape", "llama3-8b", "--policy", "lifo"), ConfigError, "did you mean 'fifo'"),
        (("--shape", "llama3-1b", "--gpu-memory", "9MiB"), BudgetError, "the least that works"),
    ],
)
def test_dump_refuses_bad_flags(
    args: tuple[str, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call("dump", *args)


def test_dump_into_a_folder_that_does_not_exist(model: Path, tmp_path: Path) -> None:
    with pytest.raises(GraphError, match=r"x\.json: cannot be written: No such file"):
        call("dump", "--model", model, *FLAGS, "-o", tmp_path / "no" / "x.json")


def test_check_accepts_a_valid_graph(step: Path) -> None:
    assert "keeps every rule" in call("check", step).stdout


def test_check_names_each_broken_rule_on_a_line_of_its_own(step: Path) -> None:
    document = json.loads(step.read_text())
    for task in document["tasks"][:2]:
        task["reads"] = ["nothing"]
    step.write_text(json.dumps(document))
    result = call("check", step)
    assert result.exit_code == 1
    lines = result.stderr.splitlines()
    assert lines[0].startswith(f"error: {step}: graph 'step' breaks 2 rule(s)")
    assert [line.split(":")[0].strip() for line in lines[1:]] == [
        f"task {task['name']}" for task in document["tasks"][:2]
    ]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(GraphError, match=r"none\.json: cannot be read: No such file"):
        call("stats", tmp_path / "none.json")


def test_diff_lists_changes_and_exits_with_one(step: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text(to_json(compile_step(small_spec(), small_plan(window=3))))
    result = call("diff", step, other, "--limit", "1")
    assert result.exit_code == 1
    assert "added slots: 1 (w 1)\n  w.2\n" in result.stdout
    assert "more\n" in result.stdout


def test_diff_of_equal_graphs(step: Path) -> None:
    result = call("diff", step, step)
    assert result.exit_code == 0
    assert result.stdout.endswith("no difference\n")


def test_stats_count_and_time_the_tasks(step: Path) -> None:
    graph = from_json(step.read_text())
    words = call("stats", step, "--machine", "rtx3090").stdout
    assert f"{len(graph.tasks)} tasks" in words
    assert "RTX 3090" in words
    rows = {line.split()[0]: line.split() for line in words.splitlines() if line.split()}
    assert int(rows["compute"][1]) == sum(t.lane.value == "compute" for t in graph.tasks)
    assert "critical path" in words


def test_names_are_printed_as_they_are(tmp_path: Path) -> None:
    b = GraphBuilder("[bold]x[/nope] :warning:")
    b.buffer("[/b]", 4, Tier.CPU, carried=True)
    b.task("sum.x", TaskKind.CPU, reads=["[/b]"], writes=["[/b]"])
    path = tmp_path / "[a].json"
    path.write_text(to_json(b.build()))
    assert call("stats", path).stdout.startswith("[bold]x[/nope] :warning:: 1 tasks")
    assert call("check", path).stdout.startswith(str(path))
    compared = CliRunner().invoke(policies_app, [str(path), "--machine", "a100"])
    assert compared.stdout.startswith("[bold]x[/nope] :warning:: 1 tasks")


def test_policies_are_compared_in_order_of_speed(step: Path) -> None:
    result = CliRunner().invoke(policies_app, [str(step), "--machine", "a100"])
    assert result.exit_code == 0, result.exception
    rows = [line.split() for line in result.stdout.splitlines()]
    found = {row[0]: float(row[1]) for row in rows if len(row) > 2 and row[2] == "s"}
    assert {"fifo", "critical-path", "earliest-deadline"} <= found.keys()
    assert list(found.values()) == sorted(found.values())
    assert INSTANCES > 1


def test_a_policy_that_fails_does_not_keep_the_others_from_being_compared(
    step: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ValueError("no [/such] luck")

    monkeypatch.setattr(MemoryAware, "choose", fail)
    result = CliRunner().invoke(policies_app, [str(step), "--machine", "a100"])
    assert result.exit_code == 1
    assert "earliest-deadline" in result.stdout
    assert "memory-aware" not in result.stdout
    assert result.stderr.splitlines() == [
        "error: policy 'memory-aware' raised ValueError('no [/such] luck') on lane h2d"
    ]
