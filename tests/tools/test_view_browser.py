"""The page of a graph in headless Chromium, used with mouse and keys as a reader would.

Pages are those that ``slideformer graph view`` writes, opened from disk. `make test-browser` runs
these tests and fails where there is no Chromium.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from selenium.webdriver.common.by import By
from typer.testing import CliRunner

from slideformer.graph.graph import TaskGraph
from slideformer.graph.serialise import from_json, to_json
from slideformer.graph.step import compile_step
from slideformer.measuring.trial import shape_config
from slideformer.models.units import model_spec
from slideformer.simulation import simulate
from slideformer.tools.graph_cli import graph_app
from slideformer.tools.view_cli import read_trace
from tests.support.browser import Page, chromium
from tests.support.specs import small_plan, small_spec

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(chromium() is None, reason="needs Chromium and its driver"),
]


def view(folder: Path, graph: TaskGraph, *flags: str) -> Path:
    """The page of a graph, as the command writes it."""
    step, path = folder / "step.json", folder / "step.html"
    step.write_text(to_json(graph))
    call("view", str(step), "-o", str(path), *flags)
    return path


def call(*arguments: str) -> None:
    """Run a ``graph`` command that succeeds."""
    result = CliRunner().invoke(graph_app, arguments)
    assert result.exit_code == 0, result.exception


GRAPH = compile_step(small_spec(), small_plan())
MACHINE = ("--machine", "rtx3090")


def drawn_bars(page: Page) -> dict[str, tuple[float, float, str]]:
    """Start, duration and row of each task in the timeline, by name."""
    bars = page.run(
        """
        const [bars] = document.getElementById("timeline").data;
        return bars.x.map((long, i) =>
          [tasks[bars.customdata[i]].name, bars.base[i], long, bars.y[i]]);
        """
    )
    return {name: (start, seconds, row) for name, start, seconds, row in bars}


def test_search_finds_a_task_and_its_details_lead_on(page: Page, tmp_path: Path) -> None:
    page.open(view(tmp_path, GRAPH, *MACHINE))
    task = GRAPH.tasks[GRAPH.index["bwd.L01.m0"]]
    page.search("bwd.L01.m0")
    assert page.heading == task.name
    for name in (*task.reads, *task.writes):
        assert name in page.details
    waits = [GRAPH.tasks[p].name for p in GRAPH.edges.predecessors[GRAPH.index[task.name]]]
    assert f"waits for ({len(waits)})" in page.details.lower()
    assert all(name in page.details for name in waits)
    timeline = simulate(GRAPH, "rtx3090")
    [span] = [s for s in timeline.spans if s.task == task.name]
    reason = max(timeline.waited_for(span), key=lambda s: s.stopped).task
    assert f"started when this was done: {reason}" in page.details
    page.driver.find_element(By.LINK_TEXT, waits[0]).click()
    assert page.heading == waits[0]
    page.search("L02")
    assert "L02" in page.heading
    page.search("no such task")
    assert "no task has this" in page.details


def test_a_click_on_a_bar_or_a_node_shows_its_task(page: Page, tmp_path: Path) -> None:
    page.open(view(tmp_path, GRAPH, *MACHINE))
    long = max((s for s in simulate(GRAPH, "rtx3090").spans), key=lambda s: s.seconds)
    page.click_into("timeline", (long.started + long.stopped) / 2, long.lane.value)
    page.until(lambda: page.heading == long.task)
    for name in ("fwd.L01.m0", "bwd.L01.m0"):
        x, y = page.run("const t = tasks[byName.get(arguments[0])]; return [t.x, t.y];", name)
        page.click_into("graph", x, y)
        page.until(lambda name=name: page.heading == name)


def test_timeline_and_memory_are_those_of_the_file(page: Page, tmp_path: Path) -> None:
    path = view(tmp_path, GRAPH, *MACHINE, "--gpu-memory", "1GiB")
    page.open(path)
    graph = from_json((tmp_path / "step.json").read_text())
    timeline = simulate(graph, "rtx3090")
    stop = timeline.makespan / 8  # what is narrower than a pixel is drawn once one zooms in
    page.run("Plotly.relayout('timeline', {'xaxis.range': [0, arguments[0]]})", stop)
    followed = "return document.getElementById('memory').layout.xaxis.range[1]"
    page.until(lambda: page.run(followed) == pytest.approx(stop))
    drawn = drawn_bars(page)
    early = [s for s in timeline.spans if s.stopped < stop and s.seconds > stop / 1000]
    assert early
    for span in early:
        start, seconds, row = drawn[span.task]
        assert (start, seconds) == pytest.approx((span.started, span.seconds))
        assert row == span.lane
    shapes = len(page.driver.find_elements(By.CSS_SELECTOR, "#timeline .bars .point"))
    assert shapes == len(drawn)
    lines = page.run(
        "return document.getElementById('memory').data.map((c) => [c.name, [...c.x], [...c.y]]);"
    )
    curves = {name: list(zip(times, levels, strict=True)) for name, times, levels in lines}
    for tier, peak in timeline.peaks().items():
        live = timeline.live(tier)
        assert curves[tier.value] == [*live, (timeline.makespan, live[-1][1])]
        assert {level for _, level in curves[f"{tier.value} places"]} == {peak}
    assert {level for _, level in curves["gpu budget"]} == {1 << 30}


def test_a_trace_stands_below_the_prediction_with_the_largest_differences(
    page: Page, tmp_path: Path
) -> None:
    trace = tmp_path / "trace.json"
    (tmp_path / "step.json").write_text(to_json(GRAPH))
    call("trace", str(tmp_path / "step.json"), "-o", str(trace), "--machine", "h200")
    page.open(view(tmp_path, GRAPH, *MACHINE, "--trace", str(trace)))
    rows = page.run(
        "return [...document.querySelectorAll('#timeline .ytick text')]"
        ".map((t) => [t.getBoundingClientRect().top, t.textContent]);"
    )
    told = [label for _, label in sorted(rows)]
    lanes = [label.split()[0] for label in told[: len(told) // 2]]
    assert told == [f"{lane} {world}" for world in ("predicted", "measured") for lane in lanes]
    predicted = {s.task: s.seconds for s in simulate(GRAPH, "rtx3090").spans}
    measured = {s.task: s.seconds for s in read_trace(trace, GRAPH).spans}
    gaps = sorted((abs(predicted[n] - measured[n]) for n in predicted), reverse=True)
    listed = [link.text for link in page.driver.find_elements(By.CSS_SELECTOR, "#differences a")]
    assert len(listed) == len(set(listed)) == 20
    assert [abs(predicted[n] - measured[n]) for n in listed] == pytest.approx(gaps[:20])
    page.driver.find_element(By.CSS_SELECTOR, "#differences a").click()
    assert page.heading == listed[0]


def test_the_largest_model_stays_usable(page: Page, tmp_path: Path) -> None:
    """A step of 123 billion parameters in 88 layers: thousands of tasks."""
    plan = small_plan(
        rows=32, seq_len=1024, micro_rows=8, offloaded=88, chunk_numel=1 << 28, vocab_chunks=4
    )
    graph = compile_step(model_spec(shape_config("mistral-large-123b")), plan)
    assert len(graph.tasks) > 3000
    path = view(tmp_path, graph, "--machine", "rtx4090")
    assert path.stat().st_size < 20 << 20
    page.open(path)
    name = "bwd.L44.m2"
    page.search(name)
    assert page.heading == name
    shapes = "return document.querySelectorAll('#timeline .bars .point').length"
    assert page.run(shapes) < 3000, "narrower than a pixel: merged until one zooms in"
    span = next(s for s in simulate(graph, "rtx4090").spans if s.task == name)
    around = [span.started - span.seconds, span.stopped + span.seconds]
    page.run("Plotly.relayout('timeline', {'xaxis.range': arguments[0]})", around)
    page.until(lambda: len(drawn_bars(page)) < 100)
    assert drawn_bars(page)[name][:2] == pytest.approx((span.started, span.seconds))
    page.click_into("timeline", (span.started + span.stopped) / 2, "compute")
    assert page.heading == name
