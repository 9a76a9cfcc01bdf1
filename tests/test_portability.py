"""What only NVIDIA's hardware or libraries have is used in few named modules, and never needed.

The rest is PyTorch, whose ROCm builds keep the names `torch.cuda` and `torch.cuda.cudart`, and
Triton without inline assembly or a vendor's library of device functions.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("graph", "memory", "runtime", "kernels", "models", "slideformer", "tools")
VENDOR = re.compile(
    r"cudnn|cublas|cufile|cupy|cutlass|kvikio|nvml|nvtx|nccl|ptx|libdevice|inline_asm|num_ctas"
    r"|get_device_capability|sm_?[89]0",
    re.IGNORECASE,
)
ALLOWED = {
    "memory/gpu_io.py": {"kvikio", "cufile"},  # only where a plan asks for files in GPU memory
    "models/fused_attention.py": {"cudnn"},  # only where PyTorch itself chooses cuDNN
    "slideformer/determinism.py": {"cublas"},  # a variable that others ignore
}


def names_used(source: str) -> Iterator[str]:
    """Identifiers, imported modules, and strings that are no docstrings."""
    tree = ast.parse(source)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.alias):
            yield node.name
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.keyword):
            yield node.arg or ""
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in docstrings
            and " " not in node.value  # a message is no use of it
        ):
            yield node.value


def vendor_names(source: str) -> set[str]:
    return {found.group().lower() for name in names_used(source) for found in VENDOR.finditer(name)}


def test_vendor_features_stay_in_their_modules() -> None:
    found = {}
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path.resolve() == path and (names := vendor_names(path.read_text("utf-8"))):
                found[str(path.relative_to(ROOT))] = names
    assert found == ALLOWED


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import cupy", {"cupy"}),
        ("torch.backends.cudnn.benchmark = True", {"cudnn"}),
        ("tl.inline_asm_elementwise('x')", {"inline_asm"}),
        ("kernel[grid](x, num_ctas=2)", {"num_ctas"}),
        ('"""About cuDNN."""', set()),
        ("raise ValueError('cuBLAS is not there')", set()),
    ],
)
def test_what_counts_as_use(source: str, expected: set[str]) -> None:
    assert vendor_names(source) == expected
