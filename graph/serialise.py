"""Task graphs as JSON: a versioned, validated text form that reads back exactly.

The file is data only: reading it resolves no name, imports nothing and runs nothing. Edges are not
stored, since they follow from the buffers. Other formats, which are written only, are in
``exchange.py``.

    {"format": "slideformer-graph", "version": 2, "name": "step",
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
from slideformer.graph.tasks import LANE_OF, Cost, Lane, Product, ProductKind, Task, TaskKind
from slideformer.graph.verify import listed, verify

FORMAT = "slideformer-graph"
VERSION = 2

_Size = Annotated[int, Field(ge=0, lt=1 << 63)]
_Name = Annotated[str, Field(min_length=1, max_length=256, pattern=r"^[^\x00-\x1f\x7f-\x9f]+$")]
_Title = Annotated[str, Field(max_length=256, pattern=r"^[^\x00-\x1f\x7f-\x9f]*$")]
_Text = Annotated[str, Field(max_length=4096)]


class _Item(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class _Product(_Item):
    kind: ProductKind
    flops: _Size
    tokens: Annotated[_Size, Field(gt=0)]
    width: Annotated[_Size, Field(gt=0)]


class _Cost(_Item):
    nbytes: _Size = 0
    flops: _Size = 0
    params: _Size = 0
    products: tuple[_Product, ...] = ()
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


class _Header(_Item):
    format: Literal["slideformer-graph"]
    version: Literal[2]
    name: _Title


class _Document(_Header):
    slots: tuple[_Slot, ...]
    buffers: tuple[_Buffer, ...]
    tasks: tuple[_Task, ...]


def to_json(graph: TaskGraph) -> str:
    """``graph`` as JSON, one slot, buffer or task a line; `from_json` gives an equal graph back.

    Raises `GraphError` for what the format cannot hold: a negative or overflowing size, a duration
    that is not finite, a name that is empty, longer than 256 characters or has control characters.
    """
    header = {"format": FORMAT, "version": VERSION, "name": graph.name}
    _item(_Header, "graph", header)
    sections = {
        "slots": [_item(_Slot, "slot", _fields(s)) for s in graph.slots.values()],
        "buffers": [_item(_Buffer, "buffer", _buffer_fields(b)) for b in graph.buffers.values()],
        "tasks": [_item(_Task, "task", _task_fields(t)) for t in graph.tasks],
    }
    lines = ["{", *(f'"{key}": {json.dumps(value)},' for key, value in header.items())]
    for key, items in sections.items():
        body = ",\n".join(item.model_dump_json(exclude_defaults=True) for item in items)
        lines += [f'"{key}": [', *([body] if body else []), "]" if key == "tasks" else "],"]
    return "\n".join([*lines, "}", ""])


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


def _fields(item: Slot | Buffer | Task | Cost | Product) -> dict[str, Any]:
    return {name: getattr(item, name) for name in item.__dataclass_fields__}


def _item(schema: type[_Item], what: str, fields: dict[str, Any]) -> _Item:
    try:
        return schema.model_validate(fields)
    except ValidationError as error:
        problem = error.errors()[0]
        reason = _field_problem(problem, problem["loc"])
        raise GraphError(f"{what} {fields['name']!r} cannot be written: {reason}") from None


def _buffer_fields(buffer: Buffer) -> dict[str, Any]:
    return _fields(buffer) | {"slot": buffer.slot or None}


def _task_fields(task: Task) -> dict[str, Any]:
    cost = _fields(task.cost) | {"products": tuple(_fields(p) for p in task.cost.products)}
    return _fields(task) | {"lane": task.lane, "cost": cost, "args": dict(task.args)}


def _buffer(item: _Buffer) -> Buffer:
    return Buffer(
        item.name, item.nbytes, item.tier, item.role, item.slot or "", item.offset, item.carried
    )


def _task(item: _Task) -> Task:
    known = item.cost
    products = tuple(Product(p.kind, p.flops, p.tokens, p.width) for p in known.products)
    cost = Cost(known.nbytes, known.flops, known.params, products, known.seconds)
    return Task(item.name, item.kind, item.op, item.reads, item.writes, item.after, cost, item.args)


def _repeated(names: Iterable[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


# -- messages ------------------------------------------------------------------------------------


def _explain(problems: Sequence[ErrorDetails], text: str | bytes) -> str:
    first = problems[0]
    if not first["loc"]:
        return f"not a task graph: {first['msg']}; write one with `slideformer graph dump`"
    raw: dict[str, Any] = json.loads(text)
    if raw.get("format") != FORMAT:
        return f"not a task graph: format is {raw.get('format')!r:.80}, expected {FORMAT!r}"
    if raw.get("version") != VERSION:
        return (
            f"the graph has version {raw.get('version')!r:.80}, this program reads version "
            f"{VERSION}; write it again with `slideformer graph dump` of this program"
        )
    return _listed([_problem(problem, raw) for problem in problems])


def _problem(problem: ErrorDetails, raw: dict[str, Any]) -> str:
    """``task fwd.L00.m0: cost.nbytes is -1: …`` for a problem inside that task."""
    where, loc = "graph", problem["loc"]
    match loc:
        case ("slots" | "buffers" | "tasks" as section, int(position), *inner):
            listed = raw[section][position]
            name = listed.get("name") if isinstance(listed, dict) else None
            shown = repr(name)[1:-1] if isinstance(name, str) else f"number {position}"
            where = f"{section[:-1]} {shown:.80}"
            loc = tuple(inner)
    return f"{where}: {_field_problem(problem, loc)}"


def _field_problem(problem: ErrorDetails, loc: Sequence[int | str]) -> str:
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    field = ".".join(map(str, loc)) or "it"
    found = "" if problem["type"] == "missing" else f" is {problem['input']!r:.80}"
    return f"{field}{found}: {problem['msg']}"


def _listed(problems: Sequence[str]) -> str:
    return listed(f"the graph has {len(problems)} problem(s)", problems)
