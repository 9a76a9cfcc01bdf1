"""Timelines as Chrome trace JSON, which Perfetto and chrome://tracing open, and back.

    sf.write_trace("folder", engine.graph, engine.timeline())

    slideformer graph view folder/step.json --trace folder/trace.json -o step.html

A process of the trace is an instance, a thread of it a lane. Times are microseconds, as the format
wants, from the first task on.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from slideformer.graph.errors import ConfigError, DataError
from slideformer.graph.graph import TaskGraph
from slideformer.graph.serialise import to_json
from slideformer.graph.tasks import Lane
from slideformer.runtime.trace import Span, Timeline
from slideformer.whole_files import write_whole

GRAPH_FILE = "step.json"
"""The graph of a step, in a trace folder."""

TRACE_FILE = "trace.json"
"""When the tasks of the last steps ran, in a trace folder."""


class _Event(BaseModel):
    """A complete event; whatever else other programs add to it is not looked at."""

    model_config = ConfigDict(strict=True)

    ph: Literal["X"]
    name: str
    cat: Lane
    pid: Annotated[int, Field(ge=0)]
    ts: Annotated[float, Field(allow_inf_nan=False)]
    dur: Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _File(BaseModel):
    traceEvents: list[dict[str, Any]]


def to_chrome(timeline: Timeline) -> str:
    """The timeline as Chrome trace JSON."""
    lanes, start = list(Lane), timeline.start
    events: list[dict[str, Any]] = []
    for number in sorted({span.instance for span in timeline.spans}):
        name = {"name": f"instance {number}"}
        events.append({"ph": "M", "name": "process_name", "pid": number, "args": name})
        for thread, lane in enumerate(lanes):
            common = {"ph": "M", "pid": number, "tid": thread}
            events.append({**common, "name": "thread_name", "args": {"name": lane}})
    for span in timeline.spans:
        events.append(
            {
                "ph": "X",
                "name": span.task,
                "cat": span.lane,
                "pid": span.instance,
                "tid": lanes.index(span.lane),
                "ts": (span.started - start) * 1e6,
                "dur": span.seconds * 1e6,
            }
        )
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}) + "\n"


def from_chrome(text: str | bytes) -> Timeline:
    """The timeline in a trace that `to_chrome` wrote; raises `DataError` for anything else."""
    try:
        events = _File.model_validate_json(text).traceEvents
        spans = [event for event in events if event.get("ph") == "X"]
        read = [_Event.model_validate_json(json.dumps(event)) for event in spans]
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"])) or "file"
        raise DataError(f"not a trace of this program: {where}: {problem['msg']}") from None
    return Timeline([Span(e.name, e.pid, e.cat, e.ts / 1e6, (e.ts + e.dur) / 1e6) for e in read])


def write_trace(folder: Path | str, graph: TaskGraph, timeline: Timeline) -> None:
    """Write a graph and when its tasks ran: ``step.json`` and ``trace.json`` in ``folder``.

    Both are replaced if they exist. Raises `ConfigError` if they cannot be written.
    """
    folder = make_folder(folder)
    files = {GRAPH_FILE: to_json(graph), TRACE_FILE: to_chrome(timeline)}
    try:
        for name, text in files.items():
            write_whole(folder / name, text)
    except OSError as error:
        raise ConfigError(f"trace folder {folder} cannot be written: {error.strerror}") from None


def make_folder(folder: Path | str) -> Path:
    """The folder for a trace, made if need be; raises `ConfigError` if it cannot be."""
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"trace folder {path} cannot be made: {error.strerror}; name another with --trace"
        ) from None
    return path
