"""The public names of the package: lazy, complete, and the same for type checkers."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import slideformer as sf

SOURCE = Path(sf.__file__).read_text(encoding="utf-8")
EXPORTS: dict[str, str] = sf._EXPORTS


@pytest.mark.parametrize("name", EXPORTS)
def test_a_public_name_comes_from_its_module(name: str) -> None:
    value = getattr(sf, name)
    assert value.__module__ == EXPORTS[name]
    assert name in dir(sf)


def test_type_checkers_see_the_same_names() -> None:
    seen = {
        alias.name: node.module
        for node in ast.walk(ast.parse(SOURCE))
        if isinstance(node, ast.ImportFrom) and node.col_offset > 0
        for alias in node.names
        if alias.asname == alias.name
    }
    assert seen == EXPORTS


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"'slideformer' has no attribute 'Trianer'"):
        _ = sf.Trianer
