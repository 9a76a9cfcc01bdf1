"""Task graphs as JSON: a versioned, validated text form that reads back exactly.

The file is data only: reading it resolves no name, imports nothing and runs nothing. Edges are not
stored, since they follow from the buffers. Other formats, which are written only, are in
``exchange.py``.

    {"format": "slideformer-graph", "version": 1, "name": "step",
     "slots": [{"name": "w.0", "tier": "gpu", "nbytes": 4096}],
     "buffers": [{"name": "w.L00.fwd.c0", "nbytes": 4096, "tier": "gpu", "slot": "w.0"}, …],
     "tasks": [{"name": "h2d.L00.fwd.c0", "kind": "H2D", "lane": "h2d", "op": "copy",
                "reads": ["hi.L00.c0"], "writes": ["w.L00.fwd.c0"], "cost": {"nbytes": 4096}}, …]}

Tasks stand in program order. A value equal to its default is left out.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from slideformer.graph.buffers import Buffer, Role, Slot, Tier
from slideformer.graph.errors import GraphError
from slideformer.graph.graph import TaskGraph
from slideformer.graph.tasks import LANE_OF, Cost, Lane, Task, TaskKind
from slideformer.graph.verify import verify

FORMAT = "slideformer-graph"
VERSION = 1

_SHOWN = 20
"""Problems that one message lists; the rest is counted."""

_Size = Annotated[int, Field(ge=0, lt=1 << 63)]
_Name = Annotated[str, Field(min_length=1, max_length=256, pattern=r"^[^\x00-\x1f\x7f]+$")]
_Text = Annotated[str, Field(max_length=4096)]


class _Item(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class _Cost(_Item):
    nbytes: _Size = 0
    flops: _Size = 0
    params: _Size = 0
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None


class _Slot(_Item):
    name: _Name
    tier: Tier
    nbytes: _Size


class _Buffer(_Item):
    name: _Name
    nbytes: _Size
    tier: Tier
    role: Role = Role.OTHER
    slot: _Name | None = None
    offset: _Size = 0
    carried: bool = False


class _Task(_Item):
    name: _Name
    kind: TaskKind
    lane: Lane
    op: _Name
    reads: tuple[_Name, ...] = ()
    writes: tuple[_Name, ...] = ()
    after: tuple[_Name, ...] = ()
    cost: _Cost = _Cost()
    args: dict[_Text, int | _Text] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _lane_fits(self) -> Self:
        lane = LANE_OF[self.kind]
        if self.lane is not lane:
            raise ValueError(f"lane is {self.lane}, but kind {self.kind} runs on lane {lane}")
        return self


class _Document(_Item):
    format: Literal["slideformer-graph"]
    version: Literal[1]
    name: _Text
    slots: tuple[_Slot, ...]
    buffers: tuple[_Buffer, ...]
    tasks: tuple[_Task, ...]


def to_json(graph: TaskGraph) -> str:
    """``graph`` as JSON, one slot, buffer or task a line; `from_json` gives an equal graph back.

    Raises `GraphError` for what the format cannot hold: a negative or overflowing size, a duration
    that is not finite, a name that is empty, longer than 256 characters or has control characters.
    """
    try:
        sections = {
            "slots": [_Slot.model_validate(_fields(s)) for s in graph.slots.values()],
            "buffers": [_Buffer.model_validate(_buffer_fields(b)) for b in graph.buffers.values()],
            "tasks": [_Task.model_validate(_task_fields(t)) for t in graph.tasks],
        }
        document = _Document.model_validate(
            {"format": FORMAT, "version": VERSION, "name": graph.name}
            | {key: tuple(items) for key, items in sections.items()}
        )
    except ValidationError as error:
        raise GraphError(
            f"graph {graph.name!r} cannot be written: {_problem(error.errors()[0], error.title)}"
        ) from None
    lines = [
        "{",
        f'"format": "{FORMAT}",',
        f'"version": {VERSION},',
        f'"name": {json.dumps(document.name)},',
    ]
    for key in ("slots", "buffers", "tasks"):
        items = [item.model_dump_json(exclude_defaults=True) for item in getattr(document, key)]
        lines += [f'"{key}": [', ",\n".join(items), "]," if key != "tasks" else "]"]
    return "\n".join([*(line for line in lines if line), "}", ""])


def from_json(text: str | bytes) -> TaskGraph:
    """The verified graph of a JSON text made by `to_json` or by hand.

    Raises one `GraphError` that lists every problem with the task, buffer or slot it is in: another
    format or version, unknown fields, kinds, tiers or roles, sizes out of range, a lane that is not
    its kind's, names listed twice, and every rule of `verify`.
    """
    try:
        document = _Document.model_validate_json(text)
    except ValidationError as error:
        raise GraphError(_explain(error.errors(), text)) from None
    twice = [
        f"{key[:-1]} {name} is listed twice"
        for key in ("slots", "buffers", "tasks")
        for name in _repeated(item.name for item in getattr(document, key))
    ]
    if twice:
        raise GraphError(_listed(twice))
    graph = TaskGraph(
        document.name,
        tuple(_task(item) for item in document.tasks),
        {item.name: _buffer(item) for item in document.buffers},
        {item.name: Slot(item.name, item.tier, item.nbytes) for item in document.slots},
    )
    verify(graph)
    return graph


# -- between dataclasses and the schema ----------------------------------------------------------


def _fields(item: Slot | Buffer | Task | Cost) -> dict[str, Any]:
    return {name: getattr(item, name) for name in item.__dataclass_fields__}


def _buffer_fields(buffer: Buffer) -> dict[str, Any]:
    return _fields(buffer) | {"slot": buffer.slot or None}


def _task_fields(task: Task) -> dict[str, Any]:
    more = {"lane": task.lane, "cost": _fields(task.cost), "args": dict(task.args)}
    return _fields(task) | more


def _buffer(item: _Buffer) -> Buffer:
    return Buffer(
        item.name, item.nbytes, item.tier, item.role, item.slot or "", item.offset, item.carried
    )


def _task(item: _Task) -> Task:
    cost = Cost(item.cost.nbytes, item.cost.flops, item.cost.params, item.cost.seconds)
    return Task(
        item.name, item.kind, item.op, item.reads, item.writes, item.after, cost, item.args
    )


def _repeated(names: Iterable[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


# -- messages ------------------------------------------------------------------------------------


def _explain(problems: Sequence[ErrorDetails], text: str | bytes) -> str:
    first = problems[0]
    if first["type"] in ("json_invalid", "model_type", "model_attributes_type"):
        return f"not a task graph: {first['msg']}; write one with `slideformer graph dump`"
    raw: dict[str, Any] = json.loads(text)
    if raw.get("format") != FORMAT:
        return f"not a task graph: format is {raw.get('format')!r}, expected {FORMAT!r}"
    if raw.get("version") != VERSION or isinstance(raw["version"], bool):
        return (
            f"the graph has version {raw.get('version')!r}, this program reads version {VERSION}; "
            "write it again with `slideformer graph dump` of this program"
        )
    return _listed([_problem(problem, _where(problem, raw)) for problem in problems])


def _where(problem: ErrorDetails, raw: dict[str, Any]) -> str:
    """``task fwd.L00.m0`` for a problem inside that task."""
    match problem["loc"]:
        case ("slots" | "buffers" | "tasks" as section, int(position), *_):
            item = raw[section][position]
            name = item.get("name") if isinstance(item, dict) else None
            return f"{section[:-1]} {name if isinstance(name, str) else f'number {position}'}"
    return "graph"


def _problem(problem: ErrorDetails, where: str) -> str:
    if problem["type"] == "value_error":
        return f"{where}: {problem['ctx']['error']}"
    inner = [part for part in problem["loc"] if isinstance(part, str) or len(problem["loc"]) < 3]
    field = ".".join(map(str, inner[1:] if where != "graph" else inner))
    found = "" if problem["type"] == "missing" else f" is {problem['input']!r:.80}"
    return f"{where}: {field}{found}: {problem['msg']}"


def _listed(problems: Sequence[str]) -> str:
    shown = "\n  ".join(problems[:_SHOWN])
    more = f"\n  … and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    return f"the graph has {len(problems)} problem(s):\n  {shown}{more}"
