"""The command line: ``slideformer train``, ``slideformer plan`` and the sub-commands of others.

A command turns its flags into a config, calls the public API and prints what comes back. Errors and
exit codes are the matter of ``console.py``. Torch is loaded by the command that needs it, so help
and complaints about flags come at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperGroup

from slideformer.config import CHANGEABLE, load_config
from slideformer.tools import view_cli as _view_cli  # noqa: F401  adds commands to `graph`
from slideformer.tools.bench_cli import bench
from slideformer.tools.console import (
    INTERRUPTED,
    reporting_errors,
    set_up_logging,
    stderr_console,
)
from slideformer.tools.data_cli import data_app
from slideformer.tools.graph_cli import graph_app
from slideformer.tools.plan_cli import plan
from slideformer.tools.profile_cli import profile
from slideformer.tools.report_cli import report
from slideformer.tools.setting_flags import FLAGS, settings_as_flags
from slideformer.tools.simulate_cli import policies_app, simulate

if TYPE_CHECKING:
    from slideformer.trainer import Trainer


class _Group(TyperGroup):
    """Runs every command, those of sub-apps included, under the rules for errors."""

    def invoke(self, ctx: Any) -> Any:
        debug = bool(ctx.params.get("debug"))
        set_up_logging(stderr_console(), debug=debug)
        with reporting_errors(debug=debug):
            return super().invoke(ctx)


app = typer.Typer(
    cls=_Group,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Fine-tune every parameter of language models that are larger than the GPU.",
)


@app.callback()
def _common(
    debug: bool = typer.Option(False, "--debug", help="Show tracebacks and debug messages."),
) -> None:
    """What holds for all commands."""


@app.command()
@settings_as_flags(FLAGS)
def train(
    config: Path | None = typer.Option(
        None, "--config", metavar="run.yaml", help="Settings in YAML; flags override them."
    ),
    **settings: Any,
) -> None:
    """Fine-tune a model on a file and save it as a Hugging Face model folder."""
    merged = load_config(config, settings)
    from slideformer.trainer import Trainer

    _run(Trainer(merged))


@app.command()
@settings_as_flags(CHANGEABLE)
def resume(
    run: Path = typer.Argument(
        metavar="RUN", help="Output folder of the run, or one of its checkpoints."
    ),
    **settings: Any,
) -> None:
    """Go on with a run that was interrupted or killed, as if it never had been.

    Settings are those of the run; the flags change where things lie, and what is shown.
    """
    from slideformer.trainer import Trainer

    _run(Trainer.resume(run, settings))


def _run(trainer: Trainer) -> None:
    """Train with progress on stderr, and say what came out."""
    from slideformer.tools.progress import ConsoleProgress

    console = stderr_console()
    set_up_logging(console)
    result = trainer.train(ConsoleProgress(console))
    print(
        f"saved {result.output}: {result.steps} steps, loss {result.loss:.4f}, "
        f"{result.tokens_per_second:,.0f} tokens/s"
    )
    if result.best is not None:
        print(f"the validation loss was lowest after step {result.best}")
    if result.exhausted:
        typer.echo(f"stopped after step {result.steps}: patience is exhausted", err=True)
    if result.interrupted:
        going_on = (
            f"; `slideformer resume {trainer.config.output}` goes on from here"
            if result.checkpoint
            else ""
        )
        typer.echo(f"interrupted after step {result.steps}; the model is saved{going_on}", err=True)
        raise typer.Exit(INTERRUPTED)


@app.command()
def export(
    checkpoint: Path = typer.Argument(
        metavar="CHECKPOINT", help="A checkpoint, or the output folder of a run for its last one."
    ),
    output: Path = typer.Option(
        ..., "--output", "-o", metavar="PATH", help="Hugging Face folder to write."
    ),
) -> None:
    """Write the weights of a checkpoint as a Hugging Face folder; needs no GPU."""
    from slideformer.training.checkpoints import find_checkpoint

    found = find_checkpoint(checkpoint)
    print(f"saved {found.export(output)}: the weights of step {found.info.step}")


@app.command()
def merge(
    adapter: Path = typer.Argument(
        metavar="ADAPTER", help="Folder of LoRA adapters: the output of a run, or of PEFT."
    ),
    output: Path = typer.Option(
        ..., "--output", "-o", metavar="PATH", help="Hugging Face folder to write."
    ),
    model: Path | None = typer.Option(
        None, "--model", metavar="DIR", help="Folder of the model, if it has moved."
    ),
) -> None:
    """Add adapters to the weights of their model, as a Hugging Face folder; needs no GPU."""
    from slideformer.merging import merge_adapters

    print(f"saved {merge_adapters(adapter, output, model)}")


app.command()(plan)
app.command()(profile)
app.command()(report)
app.command()(simulate)
app.command()(bench)
app.add_typer(data_app, name="data")
app.add_typer(graph_app, name="graph")
app.add_typer(policies_app, name="policies")
