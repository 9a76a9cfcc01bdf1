"""What is wrong with a setting, in one line: where it was set, the value, the limit, a way out."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping

from pydantic import BaseModel
from pydantic_core import ErrorDetails


def describe(model: type[BaseModel], problem: ErrorDetails, sources: Mapping[str, str]) -> str:
    """One line for one problem of ``model``; ``sources`` says where a setting was set."""
    if not problem["loc"]:
        return str(problem["ctx"]["error"])
    name = str(problem["loc"][0])
    prefix = f"{sources[name]}: " if name in sources else ""
    kind = problem["type"]
    if kind == "missing":
        return f"{name} is not set; give it as {flag_name(name)} or in the YAML file"
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(name.lower().replace("-", "_"), model.model_fields, n=1)
        known = ", ".join(model.model_fields)
        hint = f"did you mean {near[0]!r}?" if near else f"the settings are {known}"
        return f"{prefix}unknown setting {name!r}; {hint}"
    if kind == "value_error":
        return f"{prefix}{name}: {problem['ctx']['error']}"
    limit = re.sub(r"^(Input|String|Tuple)", "it", problem["msg"]).replace(
        "a valid tuple", "a list"
    )
    field = model.model_fields[name]
    if field.is_required():
        hint = "; it has no default"
    elif field.default is None:
        hint = "; it can be left out"
    else:
        hint = f"; the default is {field.default}"
    return f"{prefix}{name} is {problem['input']!r}: {limit}{hint}"


def flag_name(name: str) -> str:
    """The command-line flag of a setting: ``batch_size`` is ``--batch-size``."""
    return "--" + name.replace("_", "-")
