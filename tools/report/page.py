"""One self-contained HTML page of a run: curves, plan, settings, and a step as it was measured.

Everything is inside the page, Plotly too, so it opens from disk without a network. The step is
drawn as by `slideformer graph view`, beside what is predicted for this machine.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from string import Template
from typing import Any

from slideformer.config import Config, format_size
from slideformer.graph.machines import Machine
from slideformer.settings.values import is_size
from slideformer.simulation import simulate
from slideformer.tools.report.run_folder import RunFolder
from slideformer.tools.smoothing import Smoothed
from slideformer.tools.view.page import embedded, page_data, plotly_source

MAX_POINTS = 2000
"""Most points of a curve: of longer runs, each is the mean of several steps."""

_KNOWN = ("step", "loss", "gradient_norm", "lr", "tokens", "seconds", "skipped")
_TITLES = {
    "gradient_norm": "gradient norm",
    "lr": "learning rate",
}


def report_page(run: RunFolder, machine: Machine) -> str:
    """The page of a run; its step is predicted for ``machine``.

    Raises `ConfigError` if Plotly is not installed.
    """
    folder = resources.files("slideformer.tools.report")
    view = resources.files("slideformer.tools.view")
    step = None
    if run.step is not None:
        predicted = simulate(run.step.graph, machine.profile)
        step = page_data(predicted, run.step, {})
    return Template((folder / "report.html").read_text("utf-8")).substitute(
        title=html.escape(run.name),
        plotly=plotly_source(),
        run=embedded(run_data(run)),
        data=embedded(step),
        script=(folder / "report.js").read_text("utf-8"),
        step=(view / "page.js").read_text("utf-8") if step else "",
    )


def run_data(run: RunFolder) -> dict[str, Any]:
    """What the page's script draws: curves, and tables of names and values."""
    return {
        "summary": _summary(run.metrics),
        "curves": curves(run.metrics),
        "tables": [
            {"title": "plan", "rows": _plan_rows(run.plan)},
            {"title": "settings that are not the default", "rows": _settings(run.config)},
        ],
    }


def curves(metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The curves of a run, each with a title and series of x (steps) and y.

    Losses stand together, and what a run recorded beside the usual has a curve of its own.
    """
    smoothed = Smoothed()
    losses = [(m["step"], m["loss"]) for m in metrics if _finite(m.get("loss"))]
    smooth = [(step, smoothed.add(loss)) for step, loss in losses]
    speeds = [
        (m["step"], m["tokens"] / m["seconds"])
        for m in metrics
        if _finite(m.get("tokens")) and _finite(m.get("seconds")) and m["seconds"] > 0
    ]
    extra = dict.fromkeys(name for m in metrics for name in m if name not in _KNOWN)
    series = {name: [(m["step"], m.get(name)) for m in metrics] for name in (*_KNOWN, *extra)}
    found = [
        {
            "title": "loss (nats per target token)",
            "series": [
                _series("loss", losses),
                _series("smoothed", smooth),
                *(_series(name, series[name]) for name in extra if name.endswith("_loss")),
            ],
        },
        *(_curve(title, series[name]) for name, title in _TITLES.items()),
        _curve("tokens per second", speeds),
        *(_curve(name, series[name]) for name in extra if not name.endswith("_loss")),
    ]
    return [each for each in found if any(one["x"] for one in each["series"])]


def _curve(title: str, points: Iterable[tuple[int, Any]]) -> dict[str, Any]:
    name = title.replace("_", " ")
    return {"title": name, "series": [_series(name, points)]}


def _series(name: str, points: Iterable[tuple[int, Any]]) -> dict[str, Any]:
    """A series of the finite points, thinned to `MAX_POINTS` by means of neighbours."""
    known = [(float(x), float(y)) for x, y in points if _finite(y)]
    size = -(-len(known) // MAX_POINTS) or 1
    groups = [known[at : at + size] for at in range(0, len(known), size)]
    return {
        "name": name.replace("_", " "),
        "x": [group[-1][0] for group in groups],
        "y": [sum(y for _, y in group) / len(group) for group in groups],
    }


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _summary(metrics: Sequence[Mapping[str, Any]]) -> str:
    tokens = sum(m["tokens"] for m in metrics if _finite(m.get("tokens")))
    seconds = sum(m["seconds"] for m in metrics if _finite(m.get("seconds")))
    skipped = sum(bool(m.get("skipped")) for m in metrics)
    losses = [m["loss"] for m in metrics if _finite(m.get("loss"))]
    parts = [f"{len(metrics):,} steps", f"{tokens:,} tokens in {seconds:,.0f} s"]
    if losses:
        parts.append(f"loss {losses[0]:.4f} at first, {losses[-1]:.4f} at last")
    if skipped:
        parts.append(f"{skipped:,} steps skipped, as their gradients were not finite")
    return "; ".join(parts)


def _plan_rows(plan: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for name, value in plan.items():
        if name == "peaks" and isinstance(value, dict):
            rows += [(f"peak, {tier}", format_size(size)) for tier, size in value.items()]
        elif name == "workspace" and isinstance(value, int):
            rows.append((name, format_size(value)))
        else:
            rows.append((name.replace("_", " "), _words(value)))
    return rows


def _settings(config: Config | None) -> list[tuple[str, str]]:
    if config is None:
        return []
    plain = config.model_dump(mode="json")
    return [
        (name, format_size(plain[name]) if is_size(field) and plain[name] else _words(plain[name]))
        for name, field in type(config).model_fields.items()
        if getattr(config, name) != field.default
    ]


def _words(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_words, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_words(each)}" for name, each in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)
