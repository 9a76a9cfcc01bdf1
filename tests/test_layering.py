"""The import table: which folder may import which, checked on the syntax trees and in a process.

``ALLOWED`` is the table that CONTRIBUTING.md explains. ``slideformer`` stands for the modules of
that folder itself, and of those in it that are no links.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "graph": {"graph"},
    "memory": {"graph", "memory"},
    "runtime": {"graph", "memory", "runtime"},
    "kernels": {"kernels"},
    "models": {"graph", "kernels", "models"},
    "slideformer": {"graph", "memory", "runtime", "kernels", "models", "slideformer"},
    "tools": {"graph", "slideformer", "tools"},
}
LINKED = sorted(ALLOWED.keys() - {"slideformer"})
RESTRICTED = {"triton": {"kernels"}, "kvikio": {"memory"}}
"""Optional packages, and the folders that may import them."""

MAX_LINES = 350
LONG_MODULES: dict[str, str] = {}
"""Modules that may be longer, each with the reason."""

TORCH_FREE = [
    "slideformer",
    "slideformer.config",
    "slideformer.memory.ledger",
    "slideformer.memory.needs",
    "slideformer.memory.planner",
    "slideformer.outlook",
    "slideformer.planning",
    "slideformer.runtime.core",
    "slideformer.runtime.policies",
    "slideformer.runtime.scheduler",
    "slideformer.runtime.simulated",
    "slideformer.runtime.trace",
]
"""Modules outside graph/ that must load without torch."""


def modules() -> dict[str, Path]:
    """All our modules by path from the root, ``graph/model.py`` and so on."""
    package = ROOT / "slideformer"  # its links lead to the other folders
    own = [path for path in package.iterdir() if path.is_dir() and not path.is_symlink()]
    found = sorted([*package.glob("*.py"), *(path for each in own for path in each.rglob("*.py"))])
    for folder in LINKED:
        found += sorted(ROOT.joinpath(folder).rglob("*.py"))
    return {path.relative_to(ROOT).as_posix(): path for path in found}


def imported(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    """Dotted names of what a statement imports; ``from a import b`` may be the module ``a.b``."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    else:
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


def violations(folder: str, source: str) -> list[str]:
    """What the imports of a module in that folder break, anywhere in it, functions included."""
    broken = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        where = f"line {node.lineno}: "
        if isinstance(node, ast.ImportFrom) and node.level:
            broken.append(f"{where}relative import")
            continue
        for name in imported(node):
            top, _, rest = name.partition(".")
            if top in LINKED:
                broken.append(f"{where}bare import of {top}, write slideformer.{top}")
            if top in RESTRICTED and folder not in RESTRICTED[top]:
                broken.append(f"{where}{folder} imports {top}")
            if top == "slideformer":
                part = rest.split(".")[0]
                target = part if part in LINKED else "slideformer"
                if target not in ALLOWED[folder]:
                    broken.append(f"{where}{folder} imports {target}")
    return broken


@pytest.mark.parametrize(
    ("folder", "source", "broken"),
    [
        ("graph", "import slideformer.memory.ledger", "graph imports memory"),
        ("graph", "import slideformer", "graph imports slideformer"),
        ("memory", "from slideformer.runtime import core", "memory imports runtime"),
        ("runtime", "from slideformer import models", "runtime imports models"),
        ("runtime", "def f():\n  import slideformer.kernels.adamw", "runtime imports kernels"),
        ("kernels", "from slideformer.graph.errors import GraphError", "kernels imports graph"),
        ("models", "from slideformer import Config", "models imports slideformer"),
        ("slideformer", "from slideformer.tools.cli import app", "slideformer imports tools"),
        ("tools", "from slideformer.runtime.trace import Span", "tools imports runtime"),
        ("memory", "from . import ledger", "relative import"),
        ("memory", "from ..graph import tasks", "relative import"),
        ("memory", "from graph.tasks import Task", "bare import of graph"),
        ("tools", "import tools.cli", "bare import of tools"),
        ("runtime", "import triton.language as tl", "runtime imports triton"),
        ("kernels", "if True:\n  from kvikio import CuFile", "kernels imports kvikio"),
    ],
)
def test_a_forbidden_import_is_seen(folder: str, source: str, broken: str) -> None:
    assert [v for v in violations(folder, source) if broken in v]


@pytest.mark.parametrize(
    ("folder", "source"),
    [
        ("graph", "import networkx, graphlib\nfrom slideformer.graph.tasks import Task"),
        ("kernels", "import triton, torch\nfrom slideformer.kernels import reference"),
        ("memory", "import kvikio\nfrom slideformer.graph import plan"),
        ("models", "from slideformer.kernels.adamw import update"),
        (
            "slideformer",
            "from slideformer import models\nfrom slideformer.runtime.core import Core",
        ),
        ("tools", "import slideformer as sf\nfrom slideformer.config import Config"),
        ("tools", "from slideformer import Trainer, graph"),
    ],
)
def test_an_allowed_import_passes(folder: str, source: str) -> None:
    assert violations(folder, source) == []


@pytest.mark.parametrize("path", modules())
def test_imports_follow_the_table(path: str) -> None:
    assert violations(path.split("/")[0], modules()[path].read_text(encoding="utf-8")) == []


def test_modules_stay_short() -> None:
    lengths = {
        path: len(file.read_text(encoding="utf-8").splitlines()) for path, file in modules().items()
    }
    long = {path: lines for path, lines in lengths.items() if lines > MAX_LINES}
    assert long.keys() == LONG_MODULES.keys(), long


def load_without_torch(names: list[str]) -> subprocess.CompletedProcess[str]:
    """Import the modules in a fresh process in which importing torch fails."""
    program = (
        "import sys\nfrom importlib import import_module\nsys.modules['torch'] = None\n"
        f"for name in {names!r}:\n    import_module(name)\n"
    )
    return subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_graph_solver_core_and_simulator_load_without_torch() -> None:
    graph = [
        "slideformer." + path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for path in modules()
        if path.startswith("graph/")
    ]
    assert "slideformer.graph.errors" in graph
    done = load_without_torch([*TORCH_FREE, *graph])
    assert done.returncode == 0, done.stderr


def test_loading_torch_would_be_seen() -> None:
    done = load_without_torch(["torch"])
    assert "torch halted" in done.stderr
