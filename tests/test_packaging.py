"""What a wheel would hold and what the two commands rest on, checked without building anything."""

from __future__ import annotations

import os
import tomllib
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import slideformer

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "slideformer"
FOLDERS = ["graph", "kernels", "memory", "models", "runtime", "tools"]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def files(folder: str) -> list[Path]:
    """The files of one linked folder, seen from the folder, caches left out."""
    found = (p for p in ROOT.joinpath(folder).rglob("*") if p.is_file())
    return [p.relative_to(ROOT / folder) for p in found if "__pycache__" not in p.parts]


@pytest.mark.parametrize("folder", FOLDERS)
def test_each_folder_is_linked_into_the_package(folder: str) -> None:
    link = PACKAGE / folder
    assert link.is_symlink()
    assert link.readlink() == Path("..", folder)


def test_the_package_links_to_nothing_else() -> None:
    assert sorted(p.name for p in PACKAGE.iterdir() if p.is_symlink()) == FOLDERS


@pytest.mark.parametrize("folder", FOLDERS)
def test_each_folder_with_modules_is_a_package(folder: str) -> None:
    parents = {path.parent for path in files(folder) if path.suffix == ".py"}
    assert parents
    assert [p for p in parents if not (ROOT / folder / p / "__init__.py").is_file()] == []


@pytest.mark.parametrize("folder", FOLDERS)
def test_each_data_file_is_packed(folder: str) -> None:
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["*"]
    data = [path for path in files(folder) if path.suffix != ".py"]
    packages = {path.parent for path in files(folder) if path.name == "__init__.py"}
    for path in data:
        owner = next(p for p in path.parents if p in packages)
        inside = path.relative_to(owner).as_posix()
        # setuptools' * stops at a slash, fnmatch's does not
        same_depth = (p for p in patterns if p.count("/") == inside.count("/"))
        assert any(fnmatch(inside, pattern) for pattern in same_depth), path


def test_types_are_published() -> None:
    assert (PACKAGE / "py.typed").is_file()


def test_the_version_is_the_package_s() -> None:
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {
        "attr": "slideformer.__version__"
    }
    assert f"## [{slideformer.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_command_exists() -> None:
    module, _, attribute = PROJECT["project"]["scripts"]["slideformer"].partition(":")
    assert callable(getattr(import_module(module), attribute))


def test_kvikio_is_only_an_extra() -> None:
    assert not [d for d in PROJECT["project"]["dependencies"] if d.startswith(("kvikio", "triton"))]
    assert PROJECT["project"]["optional-dependencies"]["nvme"][0].startswith("kvikio-cu13>=")


def test_the_licence_is_whole() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License\n                           Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_ci_runs_the_test_command_of_the_readme() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make test" in script.read_text(encoding="utf-8").splitlines()[-1]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in ("demo", "test"):
        assert f"make {target}" in readme
        assert f"\n{target}:" in makefile
