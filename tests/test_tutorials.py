"""The code in the documents runs, and prints what the documents say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from slideformer.models import families

DOCS = Path(__file__).parent.parent / "docs"
_BLOCK = re.compile(r"^```(python|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("name", ["policies.md", "families.md"])
def test_a_tutorial_prints_what_it_says(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(families, "FAMILIES", dict(families.FAMILIES))  # one adds to them
    blocks = _BLOCK.findall((DOCS / name).read_text(encoding="utf-8"))
    names: dict[str, object] = {"__name__": "tutorial"}
    for kind, block in blocks:
        if kind == "python":
            exec(compile(block, name, "exec"), names)
    printed = [block for kind, block in blocks if kind == "text"]
    assert len(printed) > 0
    assert capsys.readouterr().out == "".join(printed)


def test_every_family_is_in_the_table() -> None:
    text = (DOCS / "families.md").read_text(encoding="utf-8")
    named = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    assert set(named) == set(families.FAMILIES)


def test_the_policy_of_the_tutorial_is_short() -> None:
    text = (DOCS / "policies.md").read_text(encoding="utf-8")
    [block] = [b for _, b in _BLOCK.findall(text) if "class ShortestFirst" in b]
    assert len(block.splitlines()) <= 20
