"""``slideformer data``: what is in a data file, before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from slideformer.tools.console import plain_console

if TYPE_CHECKING:
    from slideformer.data_statistics import DataStatistics

data_app = typer.Typer(
    no_args_is_help=True, help="Look into data files: tokens, lengths, what padding would cost."
)


@data_app.callback()
def _group() -> None:
    """Makes `stats` a sub-command, although it is the only one."""


@data_app.command()
def stats(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Training files.")],
    model: Annotated[Path, typer.Option(help="Model folder with the tokenizer.")],
    seq_len: Annotated[int, typer.Option(help="Tokens per row.")] = 1024,
) -> None:
    """Print a table of tokens, document lengths and padding, a column for each file.

    Files are tokenised as for training, and their tokens kept for it.
    """
    from slideformer.data_statistics import statistics_of_files

    found = statistics_of_files(files, model, seq_len)
    plain_console().print(_table([path.name for path in files], found))


def _table(names: list[str], columns: list[DataStatistics]) -> Table:
    from slideformer.data_statistics import PERCENTILES

    table = Table(f"rows of {columns[0].seq_len:,} tokens", box=None, padding=(0, 2))
    for name in names:
        table.add_column(name, justify="right", overflow="fold")

    def row(label: str, values: list[str]) -> None:
        table.add_row(label, *values)

    row("documents", [f"{each.documents:,}" for each in columns])
    row("tokens", [f"{each.tokens:,}" for each in columns])
    row("  of them learnt", [f"{each.target_tokens:,}" for each in columns])
    row("documents cut off", [f"{each.truncated_documents:,}" for each in columns])
    row("  tokens lost", [f"{each.truncated_tokens:,}" for each in columns])
    row("document length, mean", [f"{each.mean_length:,.0f}" for each in columns])
    names_of = {0: "shortest", 50: "median", 100: "longest"}
    for index, percent in enumerate(PERCENTILES):
        label = names_of.get(percent, f"{percent} % are up to")
        row(f"  {label}", [f"{each.lengths[index]:,}" for each in columns])
    row("one document a row: rows", [f"{each.padded_rows:,}" for each in columns])
    row("  padding", [f"{each.padding_share:.1%}" for each in columns])
    row("packed: rows", [f"{each.packed_rows:,}" for each in columns])
    row("  padding", [f"{each.packed_padding_share:.1%}" for each in columns])
    return table
