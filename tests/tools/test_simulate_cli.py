"""The prediction of a step, as printed, against the simulation it comes from."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from slideformer.graph.errors import BudgetError
from slideformer.simulation import simulate as simulate_graph
from slideformer.tools import simulate_cli
from slideformer.tools.step_flags import plan_step
from tests.models.tiny import tiny_config

app = typer.Typer()
app.command()(simulate_cli.simulate)

SETTINGS = {"gpu_memory": "2GiB", "batch_size": 4, "seq_len": 16}


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What the command prints for a small model, and the model's folder."""
    folder = tmp_path_factory.mktemp("model")
    tiny_config(tied=True).save_pretrained(folder)
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in SETTINGS.items()]
    result = CliRunner().invoke(app, ["--model", str(folder), "--machine", "rtx3090", *flags])
    assert result.exit_code == 0, result.exception
    return result.stdout, folder


def test_step_time_and_speed_agree(printed: tuple[str, Path]) -> None:
    text, folder = printed
    step = plan_step(folder, None, "rtx3090", **SETTINGS)
    seconds = simulate_graph(step.graph, "rtx3090", instances=3).step_seconds
    match = re.search(r"step ([\d.]+) s, ([\d,]+) tokens/s", text)
    assert match is not None
    assert float(match[1]) == pytest.approx(seconds, abs=5e-4)
    assert float(match[2].replace(",", "")) == pytest.approx(64 / seconds, rel=1e-3)


def test_every_lane_and_tier_is_listed(printed: tuple[str, Path]) -> None:
    text, folder = printed
    step = plan_step(folder, None, "rtx3090", **SETTINGS)
    words = {line.split()[0]: line for line in text.splitlines() if line.split()}
    assert {"compute", "h2d", "d2h", "cpu", "gpu", "pinned", "host"} <= words.keys()
    assert "2.00 GiB" in words["gpu"]
    assert "unlimited" in words["host"]
    shares = [float(share) for share in re.findall(r"([\d.]+)%", text)]
    assert shares == sorted(shares, reverse=True)
    assert max(shares) <= 100.1
    binding = re.search(r"bound by (\w+)", text)
    assert binding is not None
    assert re.search(rf"{binding[1]} .* {shares[0]}%", text)
    assert step.budgets.gpu == 2 << 30


def test_a_refusal_does_not_speak_of_the_host_where_that_has_no_limit() -> None:
    with pytest.raises(BudgetError, match=r"^no plan fits 1024 MiB of GPU memory for 8 rows"):
        plan_step(None, "llama3-8b", "rtx4090", gpu_memory="1GiB")
