"""SlideFormer: fine-tune every parameter of language models that are larger than the GPU.

    import slideformer as sf

    config = sf.load_config("run.yaml", {"steps": 100})
    sf.Trainer(config).train()

Names are resolved when they are first used, so importing the package is cheap and loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slideformer.config import Config as Config
    from slideformer.config import EngineConfig as EngineConfig
    from slideformer.config import load_config as load_config
    from slideformer.config import save_config as save_config
    from slideformer.engine import Engine as Engine
    from slideformer.graph.buffers import Role as Role
    from slideformer.graph.buffers import Tier as Tier
    from slideformer.graph.builder import GraphBuilder as GraphBuilder
    from slideformer.graph.errors import SlideFormerError as SlideFormerError
    from slideformer.graph.graph import TaskGraph as TaskGraph
    from slideformer.graph.machines import load_machine as load_machine
    from slideformer.graph.plan import Budgets as Budgets
    from slideformer.graph.profile import MachineProfile as MachineProfile
    from slideformer.graph.serialise import from_json as from_json
    from slideformer.graph.serialise import to_json as to_json
    from slideformer.graph.tasks import Cost as Cost
    from slideformer.graph.tasks import Lane as Lane
    from slideformer.graph.tasks import Product as Product
    from slideformer.graph.tasks import ProductKind as ProductKind
    from slideformer.graph.tasks import TaskKind as TaskKind
    from slideformer.models.data.byte_tokenizer import save_byte_tokenizer as save_byte_tokenizer
    from slideformer.running import run as run
    from slideformer.runtime.policies import Policy as Policy
    from slideformer.settings.values import format_size as format_size
    from slideformer.settings.values import parse_size as parse_size
    from slideformer.simulation import GraphTimeline as GraphTimeline
    from slideformer.simulation import simulate as simulate
    from slideformer.traces import write_trace as write_trace
    from slideformer.trainer import Trainer as Trainer

__version__ = "0.1.0"

_EXPORTS = {
    "Budgets": "slideformer.graph.plan",
    "Config": "slideformer.config",
    "Cost": "slideformer.graph.tasks",
    "Engine": "slideformer.engine",
    "EngineConfig": "slideformer.config",
    "GraphBuilder": "slideformer.graph.builder",
    "GraphTimeline": "slideformer.simulation",
    "Lane": "slideformer.graph.tasks",
    "MachineProfile": "slideformer.graph.profile",
    "Policy": "slideformer.runtime.policies",
    "Product": "slideformer.graph.tasks",
    "ProductKind": "slideformer.graph.tasks",
    "Role": "slideformer.graph.buffers",
    "SlideFormerError": "slideformer.graph.errors",
    "TaskGraph": "slideformer.graph.graph",
    "TaskKind": "slideformer.graph.tasks",
    "Tier": "slideformer.graph.buffers",
    "Trainer": "slideformer.trainer",
    "format_size": "slideformer.settings.values",
    "from_json": "slideformer.graph.serialise",
    "load_config": "slideformer.config",
    "load_machine": "slideformer.graph.machines",
    "parse_size": "slideformer.settings.values",
    "run": "slideformer.running",
    "save_byte_tokenizer": "slideformer.models.data.byte_tokenizer",
    "save_config": "slideformer.config",
    "simulate": "slideformer.simulation",
    "to_json": "slideformer.graph.serialise",
    "write_trace": "slideformer.traces",
}
"""Public name to the module that defines it; type checkers read the same names above."""


def __getattr__(name: str) -> object:
    """The public object of that name; its module is imported now."""
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(_EXPORTS[name]), name)
    globals()[name] = value  # next time no call is needed
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
