"""The command line: ``slideformer train``, ``slideformer plan`` and the sub-commands of others.

A command turns its flags into a config, calls the public API and prints what comes back. Errors and
exit codes are the matter of ``console.py``. Torch is loaded by the command that needs it, so help
and complaints about flags come at once.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import typer
from pydantic import BeforeValidator
from pydantic.fields import FieldInfo
from rich.console import Console
from typer.core import TyperGroup

from slideformer.config import Config, EngineConfig, flag_name, load_config
from slideformer.tools import view_cli as _view_cli  # noqa: F401  adds commands to `graph`
from slideformer.tools.bench_cli import bench
from slideformer.tools.console import (
    INTERRUPTED,
    reporting_errors,
    set_up_logging,
    stderr_console,
)
from slideformer.tools.graph_cli import graph_app
from slideformer.tools.simulate_cli import policies_app, simulate

Command = TypeVar("Command", bound=Callable[..., None])


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


def settings_as_flags(
    names: Iterable[str], required: Iterable[str] = ()
) -> Callable[[Command], Command]:
    """Give a command one flag for each named setting of ``Config``, beside its own parameters.

    The command receives them as keyword arguments, None where a flag was not given. Flags of
    ``required`` settings must be given; others may come from elsewhere.
    """
    must = frozenset(required)

    def add(command: Command) -> Command:
        own = [
            parameter
            for parameter in inspect.signature(command, eval_str=True).parameters.values()
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        flags = [_flag(name, Config.model_fields[name], name in must) for name in names]
        signature = inspect.Signature([*own, *flags])
        command.__signature__ = signature  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
        return command

    return add


_METAVARS = {Path: "PATH", int: "SIZE", float: "NUMBER", str: "NAME"}
"""What stands for the value of a flag that is read as text."""


def _flag(name: str, field: FieldInfo, required: bool) -> inspect.Parameter:
    """The parameter of one setting; values are checked, and sizes read, by ``Config`` itself."""
    kind, metavar = _parsed_as(field)
    option = typer.Option(
        ... if required else None,
        flag_name(name) + (f"/--no-{name.replace('_', '-')}" if kind is bool else ""),
        help=_help(field),
        metavar=metavar,
        show_default=False,
    )
    annotation = kind if required else kind | None
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=annotation
    )


def _parsed_as(field: FieldInfo) -> tuple[Any, str | None]:
    """What a flag is parsed as, text where the setting parses for itself; and its metavar."""
    annotation: Any = field.annotation
    if get_origin(annotation) is tuple:  # the flag may be repeated
        return list[str], "PATH"
    if get_origin(annotation) in (Union, types.UnionType):
        annotation = next(arm for arm in get_args(annotation) if arm is not type(None))
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) is Literal:
        return str, f"[{'|'.join(get_args(annotation))}]"
    if annotation is bool:
        return bool, None
    if annotation is int and not any(isinstance(m, BeforeValidator) for m in field.metadata):
        return int, "N"
    return str, _METAVARS[annotation]


def _help(field: FieldInfo) -> str:
    """The setting's own description, with its default."""
    text = " ".join((field.description or "").replace("``", "").split())
    if field.is_required() or field.default in (None, ()):
        return text
    return f"{text} Default: {field.default}."


@app.command()
@settings_as_flags(name for name in Config.model_fields if name != "version")
def train(
    config: Path | None = typer.Option(
        None, "--config", metavar="run.yaml", help="Settings in YAML; flags override them."
    ),
    **settings: Any,
) -> None:
    """Fine-tune a model on a file and save it as a Hugging Face checkpoint."""
    merged = load_config(config, settings)
    from slideformer.tools.progress import ConsoleProgress
    from slideformer.trainer import Trainer

    console = stderr_console()
    set_up_logging(console)
    result = Trainer(merged).train(ConsoleProgress(console))
    print(
        f"saved {result.output}: {result.steps} steps, loss {result.loss:.4f}, "
        f"{result.tokens_per_second:,.0f} tokens/s"
    )
    if result.interrupted:
        typer.echo(f"interrupted after step {result.steps}; the model is saved", err=True)
        raise typer.Exit(INTERRUPTED)


PLANNED = (
    *("model", "gpu_memory", "cpu_memory", "nvme", "nvme_memory", "nvme_write_limit"),
    *("batch_size", "seq_len"),
    *("packing", "compute", "policy", "micro_batch", "window"),
)
"""Settings that decide a plan."""


@app.command()
@settings_as_flags(PLANNED, required=["model"])
def plan(**settings: Any) -> None:
    """Print what would live where, and the predicted peaks, without allocating any of it.

    Needs no GPU: give the budget of the one meant with --gpu-memory.
    """
    given = {name: value for name, value in settings.items() if value not in (None, [])}
    config = EngineConfig.model_validate(given, context={name: flag_name(name) for name in given})
    from slideformer.planning import plan_run
    from slideformer.tools.plan_report import print_plan

    spec, planned = plan_run(config)
    print_plan(Console(highlight=False), config, spec, planned)


app.command()(simulate)
app.command()(bench)
app.add_typer(graph_app, name="graph")
app.add_typer(policies_app, name="policies")
