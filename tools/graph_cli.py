"""``slideformer graph``: write down, check, compare and summarise task graphs.

Needs no GPU. Drawing is in ``view``; running and simulating are not commands of graphs.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from slideformer.config import format_size
from slideformer.graph.diff import Difference, diff
from slideformer.graph.errors import GraphError
from slideformer.graph.exchange import to_dot, to_graphml, to_text
from slideformer.graph.graph import TaskGraph
from slideformer.graph.serialise import from_json, to_json
from slideformer.graph.stats import GraphStats, Load, graph_stats
from slideformer.tools import step_flags as flags
from slideformer.tools.console import plain_console
from slideformer.tools.setting_flags import settings_as_flags
from slideformer.whole_files import write_whole

graph_app = typer.Typer(
    no_args_is_help=True, help="Write down, check, compare and summarise task graphs."
)


class Format(StrEnum):
    """Forms in which a graph is written; only JSON is read."""

    JSON = "json"
    DOT = "dot"
    GRAPHML = "graphml"
    TEXT = "text"


_WRITERS: dict[Format, Callable[[TaskGraph], str]] = {
    Format.JSON: to_json,
    Format.DOT: to_dot,
    Format.GRAPHML: to_graphml,
    Format.TEXT: to_text,
}

GraphFile = Annotated[Path, typer.Argument(help="Graph in JSON.", metavar="FILE")]


@graph_app.command()
@settings_as_flags(flags.STEP)
def dump(
    model: flags.Model = None,
    shape: flags.Shape = None,
    machine: flags.MachineName = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File; stdout without it.")
    ] = None,
    form: Annotated[Format, typer.Option("--format", help="How to write it.")] = Format.JSON,
    **settings: Any,
) -> None:
    """Write the graph of a training step, as it would run here or on a named machine."""
    step = flags.plan_step(model, shape, machine, **settings)
    write_file(output, _WRITERS[form](step.graph))


@graph_app.command()
def check(file: GraphFile) -> None:
    """Verify a graph, edited by hand perhaps; name each broken rule with its task."""
    try:
        graph = read_graph(file)
    except GraphError as error:
        print(f"error: {error}", file=sys.stderr)  # one line for each broken rule
        raise typer.Exit(1) from None
    print(f"{file}: keeps every rule; {_size(graph)}")


@graph_app.command("diff")
def show_diff(
    old: GraphFile,
    new: Annotated[Path, typer.Argument(help="Graph to compare it with.", metavar="FILE")],
    limit: Annotated[int, typer.Option(help="Most changes to list of each sort.", min=0)] = 10,
) -> None:
    """Tell what changed from one graph to another; exit with 1 if anything did."""
    one, two = read_graph(old), read_graph(new)
    found = diff(one, two)
    print(f"{old}: {_size(one)}")
    print(f"{new}: {_size(two)}")
    if not found:
        print("no difference")
        return
    sorts: dict[str, list[Difference]] = {}
    for each in found:
        sorts.setdefault(f"{each.change} {each.what}s", []).append(each)
    for sort, members in sorts.items():
        print(f"{sort}: {len(members)} ({_by_verb(members)})")
        for each in members[:limit]:
            print(f"  {each.name}" + (f": {each.details}" if each.details else ""))
        if len(members) > limit > 0:
            print(f"  … and {len(members) - limit} more")
    raise typer.Exit(1)


@graph_app.command()
def stats(
    file: GraphFile,
    machine: flags.MachineName = None,
) -> None:
    """Print counts, bytes and seconds by kind and lane, places by tier, and the critical path."""
    known = flags.chosen_machine(machine)
    graph = read_graph(file)
    console = stdout_console()
    console.print(f"{graph.name}: {_size(graph)}; timed on {known.title}")
    for line in _stats_tables(graph_stats(graph, known.profile)):
        console.print(line)


def stdout_console() -> Console:
    """A console on stdout that does not cut tables where there is no terminal."""
    return plain_console(soft_wrap=True, width=None if sys.stdout.isatty() else 160)


def read_graph(path: Path) -> TaskGraph:
    """The graph in a file; raises `GraphError` that begins with the file's name."""
    try:
        return from_json(path.read_bytes())
    except OSError as error:
        raise GraphError(f"{path}: cannot be read: {error.strerror}") from None
    except GraphError as error:
        raise GraphError(f"{path}: {error}") from None


def write_file(path: Path | None, text: str) -> None:
    """Write a file whole or not at all, or to stdout; raises `GraphError` if it cannot be."""
    if path is None:
        sys.stdout.write(text)
        return
    try:
        write_whole(path, text)
    except OSError as error:
        raise GraphError(f"{path}: cannot be written: {error.strerror}") from None


def _size(graph: TaskGraph) -> str:
    return f"{len(graph.tasks):,} tasks, {len(graph.buffers):,} buffers, {len(graph.slots):,} slots"


def _by_verb(members: list[Difference]) -> str:
    counts = Counter(each.name.split(".", 1)[0] for each in members)
    return ", ".join(f"{verb} {count}" for verb, count in counts.most_common(6))


def _stats_tables(stats: GraphStats) -> list[Table | str]:
    work = Table("", "tasks", "bytes", "TFLOP", "params", "seconds", box=None, padding=(0, 2))
    for column in work.columns[1:]:
        column.justify = "right"
    for label, loads in (("kind", stats.kinds), ("lane", stats.lanes)):
        work.add_row(label)
        for key, load in loads.items():
            work.add_row(f"  {key}", *_cells(load))
    tiers = Table("tier", "places", box=None, padding=(0, 2))
    for tier, nbytes in stats.places.items():
        tiers.add_row(tier, format_size(nbytes))
    path = stats.critical_path
    verbs = Counter(name.split(".", 1)[0] for name in path).most_common()
    return [
        work,
        tiers,
        f"edges {stats.edges:,}; critical path {stats.critical_seconds:.3f} s over "
        f"{len(path):,} tasks: " + ", ".join(f"{verb} {count}" for verb, count in verbs),
    ]


def _cells(load: Load) -> list[str]:
    return [
        f"{load.tasks:,}",
        format_size(load.nbytes),
        f"{load.flops / 1e12:,.1f}",
        f"{load.params:,}",
        f"{load.seconds:.3f}",
    ]
