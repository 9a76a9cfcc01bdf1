"""``slideformer profile`` prints what it measured and keeps it; later commands predict with it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from slideformer import profiles
from slideformer.measuring import profiling
from slideformer.measuring.lane_rates import LaneSizes
from slideformer.measuring.product_rates import ProductSizes
from slideformer.measuring.profiling import ProfileSizes
from slideformer.tools.cli import app

TINY = ProfileSizes(
    ProductSizes((128,), (32,), (32,), 64, (32,), longest=60.0, seconds=0.01),
    LaneSizes(update_numel=8192, copy_nbytes=1 << 16, width=128, tokens=16, seconds=0.05),
    memory_nbytes=1 << 16,
    nvme_nbytes=1 << 22,
    nvme_threads=1,
)
STEP = ["--shape", "tiny", "--seq-len", "16", "--cpu-memory", "8GiB"]


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    """The command line with an empty cache and little to measure."""
    monkeypatch.setattr(profiles, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(profiling, "sizes_for", lambda _: TINY)
    return CliRunner()


def test_measured_once_it_serves_every_prediction(cli: CliRunner, tmp_path: Path) -> None:
    before = cli.invoke(app, ["simulate", *STEP])
    assert "H200" in before.stdout
    output = tmp_path / "mine.json"
    done = cli.invoke(
        app,
        ["profile", "--device", "cpu", "--nvme", str(tmp_path), "--output", str(output)],
        catch_exceptions=False,
    )
    assert done.exit_code == 0, done.stderr
    for line in ("copies up", "NVMe, writing", "forward, TFLOP/s", "between CPU tasks"):
        assert line in done.stdout
    assert "7/7" in done.stderr
    [kept] = tmp_path.glob("profile-*.json")
    assert kept.read_text() == output.read_text()

    after = cli.invoke(app, ["simulate", *STEP])
    assert "(measured)" in after.stdout
    assert after.stderr.count("Predicting for this machine") == 1
    named = cli.invoke(app, ["simulate", *STEP, "--machine", str(output)])
    assert re.search(r"step ([\d.]+) s", named.stdout)
    assert "Predicting" not in named.stderr


def test_what_cannot_be_measured_is_refused(cli: CliRunner, tmp_path: Path) -> None:
    done = cli.invoke(app, ["profile", "--device", "tpu"])
    assert done.exit_code == 1
    assert "device is 'tpu'; use auto, cuda or cpu" in done.stderr
    lost = tmp_path / "no" / "mine.json"
    done = cli.invoke(app, ["profile", "--device", "cpu", "--output", str(lost)])
    assert done.exit_code == 1
    assert "profile  0" not in done.stderr, "refused before anything is measured"
    assert f"there is no folder {lost.parent}" in done.stderr
    done = cli.invoke(app, ["profile", "--device", "cpu", "--nvme", str(tmp_path / "no")])
    assert done.exit_code == 1
    assert done.stderr.splitlines()[-1].startswith(f"error: {tmp_path / 'no'}: direct I/O")
    assert not list(tmp_path.glob("profile-*"))
