"""The NVMe benchmark trains with state on NVMe and compares the lanes with the plain loop."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from slideformer import engine
from slideformer.graph.buffers import Tier
from slideformer.graph.plan import MemoryPlan
from slideformer.tools.bench import nvme
from tests.support.specs import draft

ARGUMENTS = ["--shape", "tiny", "--batch-size", "2", "--seq-len", "16", "--lr", "1e-3"]


def run(disk: Path, *more: str) -> None:
    """Run the command as a user would."""
    nvme.main([*ARGUMENTS, "--nvme", str(disk), "--plain", "8MiB", "--device", "cpu", *more])


def test_losses_fall_and_rates_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = engine.plan_for

    def planned(*args: Any) -> MemoryPlan:
        plan = original(*args)
        peaks = {**plan.peaks, Tier.NVME: 1}
        return replace(draft(plan), resident=frozenset(), nvme_moments=2, nvme_lo=1, peaks=peaks)

    monkeypatch.setattr(engine, "plan_for", planned)
    with pytest.raises(SystemExit) as left:
        run(tmp_path, "--steps", "4")
    assert not left.value.code
    out = capsys.readouterr().out
    assert out.startswith("plan: moments of 2 layers, lower halves of 1, ")
    losses = [float(x) for x in re.findall(r"^step \d: loss ([\d.]+)", out, re.MULTILINE)]
    assert len(losses) == 4
    assert losses == sorted(losses, reverse=True)
    for way in ("read", "write", "both"):
        assert re.search(rf"^{way}: lanes [\d.]+ GB/s, plain loop .* GB/s$", out, re.MULTILINE)
    assert re.search(r"^NVMe lanes reach \d+\.\d\d of the plain loop$", out, re.MULTILINE)
    assert list(tmp_path.iterdir()) == []


def test_budgets_that_need_no_nvme_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="the plan needs no NVMe under these budgets"):
        run(tmp_path)
    assert list(tmp_path.iterdir()) == []
