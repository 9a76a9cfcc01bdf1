"""``slideformer graph view`` and ``graph trace``: a step's graph and timeline to look at."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Annotated

import typer

from slideformer.config import parse_size
from slideformer.graph.buffers import Tier
from slideformer.graph.errors import ConfigError, DataError, SlideFormerError
from slideformer.graph.graph import TaskGraph
from slideformer.simulation import GraphTimeline, simulate
from slideformer.tools import step_flags as flags
from slideformer.tools.graph_cli import GraphFile, graph_app, read_graph, write_file
from slideformer.traces import from_chrome, to_chrome

PolicyName = Annotated[str, typer.Option("--policy", help="Scheduling policy.", metavar="NAME")]
Size = Annotated[str | None, typer.Option(help="Budget to draw, as 24GiB.", metavar="SIZE")]


@graph_app.command()
def view(
    file: GraphFile,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="HTML page to write.", metavar="FILE")
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Picture to write.", metavar="FILE")] = None,
    svg: Annotated[Path | None, typer.Option(help="Picture to write.", metavar="FILE")] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Measured trace to compare with.", metavar="FILE")
    ] = None,
    machine: flags.MachineName = None,
    policy: PolicyName = "earliest-deadline",
    gpu_memory: Size = None,
    cpu_memory: Size = None,
) -> None:
    """Draw a graph, its predicted timeline and its memory: a page that needs no network, a picture.

    The budgets are drawn as lines; --cpu-memory beside pinned and pageable memory alike.
    """
    if output is png is svg is None:
        raise ConfigError("nothing to write; give -o page.html, --png FILE or --svg FILE")
    for path, suffix in ((png, ".png"), (svg, ".svg")):
        if path is not None and path.suffix != suffix:
            raise ConfigError(f"{path}: does not end in {suffix}")
    known = flags.chosen_machine(machine)
    graph = read_graph(file)
    predicted = simulate(graph, known.profile, policy)
    title = f"{file.stem}: {graph.name} on {known.title}, {policy}"
    if output is not None:
        from slideformer.tools.view.page import page

        measured = read_trace(trace, graph) if trace is not None else None
        host = {tier: cpu_memory for tier in (Tier.PINNED, Tier.CPU)}
        budgets = {
            tier: parse_size(size)
            for tier, size in {Tier.GPU: gpu_memory, **host}.items()
            if size is not None
        }
        write_file(output, page(predicted, title, measured=measured, budgets=budgets))
    for path in (png, svg):
        if path is not None:
            from slideformer.tools.view.picture import picture

            picture(predicted, title, path)


@graph_app.command("trace")
def write_trace(
    file: GraphFile,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File; stdout without it.")
    ] = None,
    machine: flags.MachineName = None,
    policy: PolicyName = "earliest-deadline",
    steps: Annotated[int, typer.Option(help="Steps to simulate.", min=1)] = 2,
) -> None:
    """Write a graph's predicted timeline as Chrome trace JSON, which Perfetto opens."""
    profile = flags.chosen_machine(machine).profile
    write_file(output, to_chrome(simulate(read_graph(file), profile, policy, steps)))


def read_trace(path: Path, graph: TaskGraph) -> GraphTimeline:
    """The last complete instance of ``graph`` in a trace; raises `DataError` if there is none."""
    try:
        timeline = from_chrome(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except SlideFormerError as error:
        raise DataError(f"{path}: {error}") from None
    names = defaultdict(list)
    for span in timeline.spans:
        names[span.instance].append(span.task)
    wanted = sorted(graph.index)
    complete = [number for number, found in names.items() if sorted(found) == wanted]
    if not complete:
        raise DataError(
            f"{path}: holds no complete instance of graph {graph.name!r} "
            f"({len(names)} instances, {len(wanted)} tasks expected in each)"
        )
    return GraphTimeline(timeline.instance(max(complete)).spans, graph=graph)
