"""``slideformer plan``: the outlook it prints, and sweeps of budgets."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from typer.testing import CliRunner

from slideformer.tools.cli import app

FLAGS = ["--shape", "llama3-1b", "--machine", "h100", "--batch-size", "4", "--seq-len", "256"]


def call(*args: object, code: int = 0, flags: Sequence[str] = FLAGS) -> str:
    """What the command prints, errors included."""
    result = CliRunner().invoke(app, ["plan", *flags, *map(str, args)])
    assert result.exit_code == code, result.output
    return result.output


def test_a_plan_says_what_binds_and_what_more_memory_gives() -> None:
    out = call("--gpu-memory", "4GiB", "--cpu-memory", "40GiB")
    assert re.search(r"gpu +[\d.]+ GiB +4\.00 GiB", out)
    assert re.search(r"Bound by \w+; work a step: ", out)
    assert re.search(r"simulated, this one is [+-][\d.]+% off", out)
    gains = r"One GiB more of GPU memory (saves [\d.]+%|nothing), of host memory nothing of a step"
    assert re.search(gains, out)


def test_a_shape_on_a_named_machine_is_planned_without_loading_torch_or_transformers() -> None:
    program = (
        "import sys\nsys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from slideformer.tools.cli import app\napp(sys.argv[1:])\n"
    )
    command = [sys.executable, "-c", program, "plan", *FLAGS, "--cpu-memory", "40GiB"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Bound by" in done.stdout


def test_ample_memory_gains_nothing_from_more() -> None:
    out = call("--gpu-memory", "70GiB", "--cpu-memory", "90GiB")
    assert "One GiB more of GPU memory nothing, of host memory nothing of a step" in out


def test_a_sweep_prints_a_table_and_draws_it(tmp_path: Path) -> None:
    plot = tmp_path / "sweep.png"
    out = call("--cpu-memory", "40GiB", "--sweep", "gpu-memory=0.5GiB..24.5GiB", "--plot", plot)
    assert plot.read_bytes().startswith(b"\x89PNG")
    rows = [line.split() for line in out.splitlines() if " GiB " in line or " MiB " in line]
    assert len(rows) == 13
    assert "no plan fits" in out, "half a GiB is too little"
    assert "By the bound that plans are compared with" in out
    speeds = [int(row[2].replace(",", "")) for row in rows if row[2] != "no"]
    assert len(speeds) > 8
    assert all(one <= 1.01 * two + 1 for one, two in pairwise(speeds))


def test_a_sweep_of_gpu_memory_is_of_a_gpu_even_where_there_is_none(tmp_path: Path) -> None:
    """Its context takes some of each budget, and the host's memory is not the GPU's too."""
    sweep = ["--sweep", "gpu-memory=1GiB..4GiB", "--plot", str(tmp_path / "sweep.png")]
    here = [*FLAGS[:2], *FLAGS[4:], "--cpu-memory", "40GiB"]
    swept = call(*sweep, flags=here)
    assert "no plan fits" in swept
    assert swept == call(*sweep, "--gpu-memory", "4GiB", flags=here)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sweep", "memory=1GiB..2GiB"], "give gpu-memory, cpu-memory, nvme-memory with two"),
        (["--sweep", "gpu-memory=1GiB"], "as gpu-memory=8GiB..80GiB"),
        (["--sweep", "gpu-memory=2GiB..1GiB"], "the first size must be the smaller one"),
        (
            ["--sweep", "gpu-memory=1..many"],
            "--sweep is 'gpu-memory=1..many': 'many' is not a size",
        ),
        (["--sweep", "gpu-memory=1MiB..2MiB"], "sweep larger ones"),
        (["--plot", "x.png"], "give --sweep as well"),
    ],
)
def test_wrong_sweeps_are_refused(flags: list[str], message: str) -> None:
    out = call("--cpu-memory", "40GiB", *flags, code=1)
    assert "error: " in out
    assert message in out
