"""A still picture of a timeline for papers: lanes over time, and memory under it.

Files are PNG or SVG, by their suffix. Pages that one can search and zoom are made in ``page.py``.
"""

from __future__ import annotations

import io
from pathlib import Path
from warnings import catch_warnings, filterwarnings

from slideformer.graph.errors import ConfigError
from slideformer.graph.exchange import COLOURS
from slideformer.graph.tasks import Lane
from slideformer.simulation import GraphTimeline
from slideformer.whole_files import write_whole

_GIB = float(1 << 30)


def picture(timeline: GraphTimeline, title: str, path: Path) -> None:
    """Draw ``timeline`` into a file; the critical path is outlined.

    Raises `ConfigError` if there is nothing to draw, Matplotlib is not installed or the file cannot
    be written.
    """
    if not timeline.spans:
        raise ConfigError(
            f"graph {timeline.graph.name!r} has no tasks, so there is no timeline to draw; give "
            "one that has"
        )
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(
            "drawing a picture needs Matplotlib; install it with: pip install 'slideformer[view]'"
        ) from None
    start = timeline.start
    used = {task.lane for task in timeline.graph.tasks}
    lanes = [lane for lane in Lane if lane in used]
    critical = {(span.task, span.instance) for span in timeline.critical_path()}
    figure = Figure(figsize=(10, 1.8 + 0.5 * len(lanes)), layout="constrained")
    upper, lower = figure.subplots(2, sharex=True, height_ratios=[0.5 * len(lanes), 1.3])
    for row, lane in enumerate(reversed(lanes)):
        spans = timeline.of_lane(lane)
        upper.broken_barh(
            [(span.started - start, span.seconds) for span in spans],
            (row - 0.4, 0.8),
            facecolors=COLOURS[lane],
            edgecolors=[
                "black" if (span.task, span.instance) in critical else "white" for span in spans
            ],
            linewidths=0.4,
        )
    upper.set_yticks(range(len(lanes)), [lane.value for lane in reversed(lanes)])
    upper.set_title(title, fontsize="medium", parse_math=False)
    tiers = list(timeline.peaks())
    for tier in tiers:
        curve = timeline.live(tier)
        times = [*(time - start for time, _ in curve), timeline.makespan]
        levels = [*(nbytes / _GIB for _, nbytes in curve), curve[-1][1] / _GIB]
        lower.step(times, levels, where="post", label=tier.value)
    lower.set_ylabel("GiB")
    lower.set_ylim(bottom=0)
    lower.set_xlabel("seconds")
    lower.set_xlim(0, timeline.makespan or 1.0)
    if tiers:
        lower.legend(loc="upper right", fontsize="small")
    try:
        drawn = io.BytesIO()
        with catch_warnings():
            filterwarnings("ignore", "Glyph")  # its font has not every letter of every name
            figure.savefig(drawn, dpi=200, format=path.suffix[1:])
        write_whole(path, drawn.getvalue())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None
