"""Timelines as Chrome traces: what comes back, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slideformer.graph.errors import ConfigError, DataError
from slideformer.graph.graph import TaskGraph
from slideformer.graph.profile import MachineProfile
from slideformer.graph.serialise import from_json
from slideformer.simulation import simulate
from slideformer.traces import from_chrome, to_chrome, write_trace
from tests.support.graphs import step_like, task_graphs


@given(task_graphs(), st.integers(1, 3))
def test_a_trace_reads_back(graph: TaskGraph, instances: int) -> None:
    timeline = simulate(graph, MachineProfile(), instances=instances)
    again = from_chrome(to_chrome(timeline))
    assert [(s.task, s.instance, s.lane) for s in again.spans] == [
        (s.task, s.instance, s.lane) for s in timeline.spans
    ]
    for one, two in zip(timeline.spans, again.spans, strict=True):
        assert two.started == pytest.approx(one.started - timeline.start, abs=1e-9)
        assert two.seconds == pytest.approx(one.seconds, abs=1e-9)


def test_a_graph_and_its_trace_are_written_together(tmp_path: Path) -> None:
    graph = step_like(2)
    timeline = simulate(graph, MachineProfile(), instances=2)
    for _ in range(2):  # the second time it replaces the first
        write_trace(tmp_path / "a" / "b", graph, timeline)
    files = sorted(path.name for path in (tmp_path / "a" / "b").iterdir())
    assert files == ["step.json", "trace.json"]
    assert from_json((tmp_path / "a" / "b" / "step.json").read_bytes()) == graph
    assert len(from_chrome((tmp_path / "a" / "b" / "trace.json").read_bytes()).spans) == 20
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"trace folder .*file/t cannot be made: Not a directory"):
        write_trace(tmp_path / "file" / "t", graph, timeline)


def test_lanes_and_instances_have_names() -> None:
    event = {"ph": "X", "name": "a.b", "cat": "h2d", "pid": 4, "ts": 5.0, "dur": 1.0}
    text = to_chrome(from_chrome(json.dumps({"traceEvents": [event], "other": 1})))
    events = json.loads(text)["traceEvents"]
    assert [e["args"]["name"] for e in events if e["name"] == "process_name"] == ["instance 4"]
    [span] = [e for e in events if e["ph"] == "X"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert names[span["tid"]] == span["cat"] == "h2d"
    assert (span["ts"], span["dur"]) == (0.0, pytest.approx(1.0))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"file: Invalid JSON"),
        ("[]", r"file: Input should be an object"),
        ('{"traceEvents": [{"ph": "X", "name": "a"}]}', r"cat: Field required"),
        (
            '{"traceEvents": [{"ph":"X","name":"a","cat":"gpu","pid":0,"ts":0,"dur":1}]}',
            r"cat: Input should be 'compute'",
        ),
        (
            '{"traceEvents": [{"ph":"X","name":"a","cat":"cpu","pid":0,"ts":0,"dur":-1}]}',
            r"dur: Input should be greater than or equal to 0",
        ),
    ],
)
def test_what_is_no_trace_is_refused(text: str, message: str) -> None:
    with pytest.raises(DataError, match=f"not a trace of this program: {message}"):
        from_chrome(text)
