"""The page and the pictures of a graph: complete and self-contained.

``test_view_browser.py`` uses the page as a reader would.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from slideformer.graph.buffers import Tier
from slideformer.graph.builder import GraphBuilder
from slideformer.graph.errors import ConfigError, DataError, SlideFormerError
from slideformer.graph.serialise import to_json
from slideformer.graph.step import compile_step
from slideformer.graph.tasks import TaskKind
from slideformer.simulation import GraphTimeline, simulate
from slideformer.tools import view_cli
from slideformer.tools.graph_cli import graph_app
from slideformer.tools.view.page import page, page_data
from slideformer.traces import from_chrome, to_chrome
from tests.support.specs import small_plan, small_spec

GRAPH = compile_step(small_spec(), small_plan())
_DATA = re.compile(r'<script type="application/json" id="data">(.*?)</script>', re.DOTALL)


@pytest.fixture
def step(tmp_path: Path) -> Path:
    """The graph of a small step in a file."""
    path = tmp_path / "step.json"
    path.write_text(to_json(GRAPH))
    return path


def call(*args: str | Path) -> str:
    """Run a ``graph`` command that succeeds; errors of the package are left to the caller."""
    result = CliRunner().invoke(graph_app, [str(arg) for arg in args])
    if isinstance(result.exception, SlideFormerError):
        raise result.exception
    assert result.exit_code == 0, result.exception
    return result.stdout


def test_the_page_holds_every_task_with_its_edges_and_times(step: Path) -> None:
    path = step.with_suffix(".html")
    call("view", step, "-o", path, "--machine", "a100", "--gpu-memory", "1GiB")
    text = path.read_text()
    found = _DATA.search(text)
    assert found is not None
    data = json.loads(found[1])
    timeline = simulate(GRAPH, "a100")
    spans = {span.task: span for span in timeline.spans}
    assert [t["name"] for t in data["tasks"]] == [t.name for t in GRAPH.tasks]
    for task, predecessors in zip(data["tasks"], GRAPH.edges.predecessors, strict=True):
        assert tuple(task["waits"]) == predecessors
        assert task["span"] == [spans[task["name"]].started, spans[task["name"]].stopped]
        assert all(data["tasks"][p]["x"] < task["x"] for p in predecessors)
    assert {m["name"]: max(m["bytes"]) for m in data["memory"]} == {
        tier.value: max(n for _, n in timeline.live(tier)) for tier in timeline.peaks()
    }
    [gpu] = [m for m in data["memory"] if m["name"] == "gpu"]
    assert ["budget", 1 << 30] in gpu["limits"]
    assert data["stop"] == timeline.makespan


def test_the_page_needs_no_network(step: Path) -> None:
    path = step.with_suffix(".html")
    call("view", step, "-o", path)
    outside = path.read_text().replace(_plotly(), "")
    assert not re.search(r"https?://|\bsrc=|\bhref=", outside)


def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def test_names_from_a_file_are_data_in_the_page() -> None:
    b = GraphBuilder("g")
    hostile = "</script><script>alert(1)</script>"
    b.buffer(hostile, 4, Tier.CPU, carried=True)
    b.task("a.x", TaskKind.CPU, op="<b>", reads=[hostile])
    text = page(simulate(b.build(), "h200"), "<i>title</i>")
    assert hostile not in text
    assert "<i>title" not in text
    found = _DATA.search(text)
    assert found is not None
    assert json.loads(found[1])["tasks"][0]["reads"] == [hostile]


def test_a_measured_trace_stands_beside_the_prediction(step: Path) -> None:
    trace = step.with_name("trace.json")
    call("trace", step, "-o", trace, "--machine", "rtx3090", "--steps", "2")
    measured = view_cli.read_trace(trace, GRAPH)
    assert len(measured.spans) == len(GRAPH.tasks)
    assert {s.instance for s in measured.spans} == {1}
    predicted = simulate(GRAPH, "h200")
    data = page_data(predicted, measured, {})
    assert [world["name"] for world in data["worlds"]] == ["predicted", "measured"]
    assert data["colours"].keys() >= set(data["lanes"])
    first = [min(start for _, start, _ in w["spans"]["compute"]) for w in data["worlds"]]
    assert first[0] == pytest.approx(first[1])
    gaps = [abs(one - two) for _, one, two in data["differences"]]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] == pytest.approx(
        max(
            abs(a.seconds - b.seconds)
            for a in predicted.spans
            for b in measured.spans
            if a.task == b.task
        )
    )


def test_a_trace_of_another_graph_is_refused(step: Path) -> None:
    trace = step.with_name("trace.json")
    whole = simulate(GRAPH, "h200")
    trace.write_text(to_chrome(GraphTimeline(whole.spans[1:], graph=GRAPH)))
    with pytest.raises(DataError, match=r"trace\.json: holds no complete instance of graph 'step'"):
        call("view", step, "-o", step.with_suffix(".html"), "--trace", trace)
    trace.write_text("{}")
    with pytest.raises(DataError, match=r"trace\.json: not a trace"):
        call("view", step, "-o", step.with_suffix(".html"), "--trace", trace)


def test_the_trace_command_writes_the_simulated_timeline(step: Path) -> None:
    timeline = from_chrome(call("trace", step, "--machine", "a100", "--steps", "1"))
    assert timeline.makespan == pytest.approx(simulate(GRAPH, "a100").makespan)


def test_pictures_are_written(step: Path) -> None:
    png, svg = step.with_suffix(".png"), step.with_suffix(".svg")
    call("view", step, "--png", png, "--svg", svg)
    assert png.read_bytes().startswith(b"\x89PNG")
    text = svg.read_text()
    assert "<svg" in text
    assert "</svg>" in text


def test_a_picture_of_no_tasks_is_refused_and_titles_are_no_formulas(tmp_path: Path) -> None:
    path = tmp_path / "graph.json"
    path.write_text(to_json(GraphBuilder("none").build()))
    with pytest.raises(ConfigError, match="'none' has no tasks"):
        call("view", path, "--svg", tmp_path / "none.svg")
    path.write_text(to_json(replace(GRAPH, name=r"$\nothing{$ 模型")))
    call("view", path, "--svg", tmp_path / "odd.svg")
    b = GraphBuilder("no buffers")
    b.task("wait.x", TaskKind.CPU)
    path.write_text(to_json(b.build()))
    call("view", path, "--png", tmp_path / "wait.png")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["graph.json", "odd.svg", "wait.png"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], r"nothing to write; give -o page\.html"),
        (["--png", "x.svg"], r"x\.svg: does not end in \.png"),
        (["-o", "x.html", "--machine", "h20"], r"did you mean h200"),
        (["--svg", "/nowhere/x.svg"], r"/nowhere/x\.svg: cannot be written"),
    ],
)
def test_bad_flags_are_refused(step: Path, flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call("view", step, *flags)


@pytest.mark.parametrize(
    ("module", "flag"), [("plotly.offline", "-o x.html"), ("matplotlib.figure", "--png x.png")]
)
def test_a_missing_library_is_named(
    step: Path, monkeypatch: pytest.MonkeyPatch, module: str, flag: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=r"pip install 'slideformer\[view\]'"):
        call("view", step, *flag.split())
