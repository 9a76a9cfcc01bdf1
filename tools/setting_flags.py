"""Settings as flags of commands: declared once, in ``Config``, with their help and defaults."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import typer
from pydantic import BeforeValidator
from pydantic.fields import FieldInfo

from slideformer.config import Config
from slideformer.settings.problems import flag_name

Command = TypeVar("Command", bound=Callable[..., None])

_FLAGLESS = ("version", "parameter_groups", "lora")

FLAGS = tuple(name for name in Config.model_fields if name not in _FLAGLESS)
"""Settings that have a flag; the others are in the YAML file only."""

PLANNED = (
    *("model", "gpu_memory", "cpu_memory", "nvme", "nvme_memory", "nvme_write_limit"),
    *("batch_size", "accumulate", "seq_len", "optimizer"),
    *("packing", "compute", "policy", "micro_batch", "window"),
    *("max_grad_norm", "skip_nonfinite"),
)
"""Settings that decide a plan."""


def settings_as_flags(names: Iterable[str]) -> Callable[[Command], Command]:
    """Give a command one flag for each named setting of ``Config``, beside its own parameters.

    The command receives them as keyword arguments, None where a flag was not given.
    """

    def add(command: Command) -> Command:
        own = [
            parameter
            for parameter in inspect.signature(command, eval_str=True).parameters.values()
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        flags = [_flag(name, Config.model_fields[name]) for name in names]
        signature = inspect.Signature([*own, *flags])
        command.__signature__ = signature  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
        return command

    return add


_METAVARS = {Path: "PATH", int: "SIZE", float: "NUMBER", str: "NAME"}
"""What stands for the value of a flag that is read as text."""


def _flag(name: str, field: FieldInfo) -> inspect.Parameter:
    """The parameter of one setting; values are checked, and sizes read, by ``Config`` itself."""
    kind, metavar = _parsed_as(field)
    option = typer.Option(
        None,
        flag_name(name) + (f"/--no-{name.replace('_', '-')}" if kind is bool else ""),
        help=_help(field),
        metavar=metavar,
        show_default=False,
    )
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=kind | None
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
