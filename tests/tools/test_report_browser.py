"""The page of a run in headless Chromium: curves, tables and the step, with and without a trace."""

from __future__ import annotations

from pathlib import Path

import pytest
from selenium.webdriver.common.by import By
from typer.testing import CliRunner

from slideformer.tools.cli import app
from tests.support.browser import Page, chromium
from tests.support.runs import write_run

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(chromium() is None, reason="needs Chromium and its driver"),
]


def write_page(run: Path) -> Path:
    path = run.with_suffix(".html")
    done = CliRunner().invoke(app, ["report", str(run), "-o", str(path), "--machine", "a100"])
    assert done.exit_code == 0, done.stderr
    return path


def titles(page: Page) -> list[str]:
    return [each.text for each in page.driver.find_elements(By.CSS_SELECTOR, "#curves .gtitle")]


def test_curves_tables_and_the_step_are_drawn(page: Page, tmp_path: Path) -> None:
    page.open(write_page(write_run(tmp_path / "run")))
    page.until(lambda: page.run("return document.body.dataset.curves") == "drawn")
    assert titles(page) == [
        "loss (nats per target token)",
        "gradient norm",
        "learning rate",
        "tokens per second",
    ]
    lines = page.run("return document.querySelectorAll('#curves .scatterlayer .trace').length")
    assert lines == 6
    text = page.driver.find_element(By.ID, "tables").text
    assert "peak, gpu 3.00 GiB" in text
    assert "<b>.jsonl" in text, "text is text and no markup"
    page.search("bwd.L01.m0")
    page.until(lambda: page.heading == "bwd.L01.m0")


def test_a_run_without_a_trace_has_no_step(page: Page, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "step.json").unlink()
    page.driver.get(write_page(run).as_uri())
    page.until(lambda: page.run("return document.body.dataset.curves") == "drawn")
    assert len(titles(page)) == 4
    assert not page.driver.find_element(By.ID, "step").is_displayed()
