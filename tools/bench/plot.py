"""`python -m slideformer.tools.bench.plot FILE.json … --output FILE.png`: measured rows as curves.

Reads what `slideformer bench --json` wrote. Left: tokens/s against batch size, a curve for each
shape and GPU budget; right: against GPU budget, a curve for each shape and batch. Baselines are
dashed and of the same colour. A curve has at least two rows.
"""

from __future__ import annotations

import io
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from slideformer.config import parse_size
from slideformer.graph.errors import ConfigError
from slideformer.tools.bench.rows import Row
from slideformer.tools.console import run_alone
from slideformer.whole_files import write_whole

_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Point:
    """One row: GPU budget in GiB, tokens/s of both sides (None: not measured)."""

    shape: str
    batch: int
    gpu: float
    ours: float
    baseline: str
    theirs: float | None


def read_points(paths: Iterable[Path]) -> list[Point]:
    """The measured rows of reports; raises `ConfigError` for a file that is none."""
    found = []
    for path in paths:
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
            for each in report["rows"]:
                row, measured = Row.model_validate(each["row"]), each["summary"]
                if "ours" in measured and row.gpu_memory is not None:
                    gpu = parse_size(row.gpu_memory) / _GIB
                    theirs = measured.get("theirs")
                    found.append(
                        Point(
                            row.shape, row.batch_size, gpu, measured["ours"], row.baseline, theirs
                        )
                    )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path}: is not a report of `slideformer bench --json`: {error}"
            ) from None
    return found


def curves(points: Sequence[Point], axis: str) -> dict[str, list[Point]]:
    """Points of two or more rows that differ in ``axis``, ``batch`` or ``gpu``, alone."""
    groups: dict[str, list[Point]] = defaultdict(list)
    for point in points:
        rest = f"{point.gpu:g} GiB" if axis == "batch" else f"batch {point.batch}"
        groups[f"{point.shape}, {rest}"].append(point)
    return {
        name: sorted(group, key=lambda p: float(getattr(p, axis)))
        for name, group in groups.items()
        if len({getattr(p, axis) for p in group}) > 1
    }


def draw(points: Sequence[Point], output: Path) -> None:
    """Write both plots into one picture. Raises `ConfigError` if there is nothing to draw."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(
            "pictures need matplotlib; install it with: pip install 'slideformer[view]'"
        ) from None
    panels = {axis: curves(points, axis) for axis in ("batch", "gpu")}
    if not any(panels.values()):
        raise ConfigError("no two rows differ in batch size or GPU budget alone; measure more rows")
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    labels = {"batch": "rows in a step", "gpu": "GPU budget, GiB"}
    for place, (axis, groups) in enumerate(panels.items(), start=1):
        plot = figure.add_subplot(1, 2, place)
        for number, (name, group) in enumerate(groups.items()):
            colour = f"C{number}"
            at = [getattr(p, axis) for p in group]
            plot.plot(at, [p.ours for p in group], "o-", color=colour, label=name)
            _baselines(plot, group, axis, colour)
        plot.set_xlabel(labels[axis])
        plot.set_ylabel("tokens/s")
        plot.set_xscale("log", base=2)
        plot.set_ylim(bottom=0)
        if groups:
            plot.legend(fontsize="small")
    try:
        drawn = io.BytesIO()
        figure.savefig(drawn, dpi=150, format=output.suffix[1:] or "png")
        write_whole(output, drawn.getvalue())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{output}: cannot be written: {error}") from None


def _baselines(plot: Any, group: Sequence[Point], axis: str, colour: str) -> None:
    """A dashed curve for each baseline among the points."""
    sides: Mapping[str, list[Point]] = defaultdict(list)
    for point in group:
        if point.theirs is not None:
            sides[point.baseline].append(point)
    for name, measured in sides.items():
        at = [getattr(p, axis) for p in measured]
        plot.plot(at, [p.theirs for p in measured], "x--", color=colour, label=name)


def bench_plot(
    reports: Annotated[list[Path], typer.Argument(help="Files of slideformer bench --json.")],
    output: Annotated[Path, typer.Option(help="Picture to write, PNG or SVG.")],
) -> None:
    """Draw tokens/s against batch size and against GPU budget."""
    draw(read_points(reports), output)


def main(arguments: Any = None) -> None:
    """Run it without the rest of the command line."""
    run_alone(bench_plot, arguments)


if __name__ == "__main__":
    main()
