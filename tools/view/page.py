"""One self-contained HTML page of a graph: its timeline, memory and dependencies.

Everything is inside the page, Plotly too, so it opens from disk without a network. Times are
predicted; a measured timeline may stand beside them.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from importlib import resources
from string import Template
from typing import Any

from slideformer.graph.analysis import topological_order
from slideformer.graph.buffers import Tier
from slideformer.graph.errors import ConfigError
from slideformer.graph.exchange import COLOURS
from slideformer.graph.graph import TaskGraph
from slideformer.graph.tasks import Lane
from slideformer.simulation import GraphTimeline

_DIFFERENCES = 20
_ROW = 0.35
"""Half the height of a lane's row in the drawn graph, of which lanes are 1 apart."""


def page(
    predicted: GraphTimeline,
    title: str,
    *,
    measured: GraphTimeline | None = None,
    budgets: Mapping[Tier, int] | None = None,
) -> str:
    """The page of a timeline of one instance, and of a measured one of the same graph.

    Raises `ConfigError` if Plotly is not installed.
    """
    folder = resources.files("slideformer.tools.view")
    return Template((folder / "page.html").read_text("utf-8")).substitute(
        title=html.escape(title),
        plotly=plotly_source(),
        data=embedded(page_data(predicted, measured, budgets or {})),
        script=(folder / "page.js").read_text("utf-8"),
    )


def plotly_source() -> str:
    """Plotly's JavaScript; raises `ConfigError` if it is not installed."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise ConfigError(
            "drawing a page needs Plotly; install it with: pip install 'slideformer[view]'"
        ) from None
    source: str = get_plotlyjs()
    return source


def embedded(data: Any) -> str:
    """JSON that may stand within a page's element: nothing in it ends that."""
    return json.dumps(data, allow_nan=False).replace("<", "\\u003c")


def page_data(
    predicted: GraphTimeline, measured: GraphTimeline | None, budgets: Mapping[Tier, int]
) -> dict[str, Any]:
    """What the page's script draws: seconds from the predicted start, tasks by position.

    Both timelines are laid over each other where they begin to compute: a measured step that
    follows another begins to copy early.
    """
    graph, index, start = predicted.graph, predicted.graph.index, predicted.start
    worlds = [_world("predicted", predicted, predicted.start)]
    if measured:
        worlds.append(_world("measured", measured, _begin(measured) - _begin(predicted) + start))
    times = [at for world in worlds for row in world["spans"].values() for _, *at in row]
    spans = {index[s.task]: s for s in predicted.spans}
    used = {task.lane for task in graph.tasks}
    lanes = [lane for lane in Lane if lane in used]
    places = _places(graph, lanes)
    tasks = [
        {
            "name": task.name,
            "kind": task.kind,
            "lane": task.lane,
            "op": task.op,
            "reads": task.reads,
            "writes": task.writes,
            "waits": graph.edges.predecessors[position],
            "span": [spans[position].started - start, spans[position].stopped - start],
            "blocker": _blocker(predicted, position, spans),
            "x": places[position][0],
            "y": places[position][1],
        }
        for position, task in enumerate(graph.tasks)
    ]
    return {
        "summary": f"{len(tasks):,} tasks, predicted {predicted.makespan:.3f} s"
        + (f", measured {measured.makespan:.3f} s" if measured else ""),
        "start": min((begin for begin, _ in times), default=0.0),
        "stop": max((end for _, end in times), default=1.0),
        "lanes": lanes,
        "colours": COLOURS,
        "tasks": tasks,
        "buffers": {b.name: [b.nbytes, b.tier, b.slot] for b in graph.buffers.values()},
        "worlds": worlds,
        "critical": [index[span.task] for span in predicted.critical_path()],
        "memory": _memory(predicted, budgets),
        "differences": _differences(predicted, measured) if measured else [],
    }


def _world(name: str, timeline: GraphTimeline, origin: float) -> dict[str, Any]:
    index = timeline.graph.index
    spans = {
        lane.value: [
            (index[s.task], s.started - origin, s.stopped - origin) for s in timeline.of_lane(lane)
        ]
        for lane in Lane
    }
    return {"name": name, "spans": spans}


def _begin(timeline: GraphTimeline) -> float:
    """When the first task computes; without one, the start."""
    return min((s.started for s in timeline.of_lane(Lane.COMPUTE)), default=timeline.start)


def _blocker(timeline: GraphTimeline, position: int, spans: Mapping[int, Any]) -> int:
    """The task whose end a task waited for last, or −1."""
    waited = timeline.waited_for(spans[position])
    if not waited:
        return -1
    return timeline.graph.index[max(waited, key=lambda span: span.stopped).task]


def _places(graph: TaskGraph, lanes: list[Lane]) -> dict[int, tuple[int, float]]:
    """A point for each task: column by the longest way to it, row by lane, spread where crowded."""
    column: dict[int, int] = {}
    cells: dict[tuple[int, Lane], list[int]] = {}
    for position in topological_order(graph):
        before = graph.edges.predecessors[position]
        column[position] = 1 + max((column[p] for p in before), default=-1)
        cells.setdefault((column[position], graph.tasks[position].lane), []).append(position)
    places: dict[int, tuple[int, float]] = {}
    for (x, lane), members in cells.items():
        for number, position in enumerate(members, start=1):
            spread = 2 * number / (len(members) + 1) - 1
            places[position] = (x, lanes.index(lane) + _ROW * spread)
    return places


def _memory(timeline: GraphTimeline, budgets: Mapping[Tier, int]) -> list[dict[str, Any]]:
    found, start = [], timeline.start
    for tier, peak in timeline.peaks().items():
        curve = timeline.live(tier)
        limits = [("places", peak)] + ([("budget", budgets[tier])] if tier in budgets else [])
        found.append(
            {
                "name": tier,
                "times": [*(t - start for t, _ in curve), timeline.makespan],
                "bytes": [*(n for _, n in curve), curve[-1][1]],
                "limits": limits,
            }
        )
    return found


def _differences(
    predicted: GraphTimeline, measured: GraphTimeline
) -> list[tuple[int, float, float]]:
    """Tasks whose duration is furthest from the predicted one: position, predicted, measured."""
    expected = {span.task: span.seconds for span in predicted.spans}
    found = [(s.task, expected[s.task], s.seconds) for s in measured.spans]
    found.sort(key=lambda each: -abs(each[1] - each[2]))
    return [(predicted.graph.index[task], one, two) for task, one, two in found[:_DIFFERENCES]]
