"""Headless Chromium, where it is installed, and a page in it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

PATIENCE = 180
"""Seconds after which a page counts as hung, on a busy machine without a GPU."""


def chromium() -> str | None:
    """The browser, or None unless its driver is there too."""
    found = shutil.which("chromium") or shutil.which("google-chrome")
    return found if chromium_driver() else None


def chromium_driver() -> str | None:
    """What Selenium speaks to."""
    return shutil.which("chromedriver")


class Page:
    """An open page."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, path: Path) -> None:
        """Load a file and wait until it is drawn."""
        self.driver.get(path.as_uri())
        self.until(lambda: self.run("return document.body.dataset.ready") == "yes")

    def until(self, happened: Callable[[], Any]) -> None:
        """Wait for something."""
        WebDriverWait(self.driver, PATIENCE, poll_frequency=0.1).until(lambda _: happened())

    def run(self, script: str, *arguments: Any) -> Any:
        """What a piece of JavaScript returns."""
        return self.driver.execute_script(script, *arguments)

    def search(self, text: str) -> None:
        """Type into the search box and press Enter."""
        box = self.driver.find_element(By.ID, "search")
        box.clear()
        box.send_keys(text, Keys.ENTER)

    @property
    def heading(self) -> str:
        """The name of the task whose details are shown."""
        found = self.driver.find_elements(By.CSS_SELECTOR, "#details h1")
        return found[0].text if found else ""

    @property
    def details(self) -> str:
        """All that is said of a task."""
        return self.driver.find_element(By.ID, "details").text

    def click_into(self, plot: str, x: float, y: str | float) -> None:
        """Click at a point of a plot, in the plot's own units."""
        element = self.driver.find_element(By.ID, plot)
        self.driver.execute_script("arguments[0].scrollIntoView()", element)
        left, top = self.run(
            """
            const plot = document.getElementById(arguments[0]);
            const box = plot.querySelector(".nsewdrag").getBoundingClientRect();
            const {xaxis, yaxis} = plot._fullLayout;
            return [box.left + xaxis.d2p(arguments[1]), box.top + yaxis.d2p(arguments[2])];
            """,
            plot,
            x,
            y,
        )
        actions = ActionChains(self.driver)
        actions.w3c_actions.pointer_action.move_to_location(round(left), round(top))
        actions.pause(0.3).click().perform()

    def complaints(self) -> list[str]:
        """Errors in the console, exceptions that nobody caught among them."""
        entries = self.driver.get_log("browser")
        return [entry["message"] for entry in entries if entry["level"] == "SEVERE"]


@pytest.fixture(scope="module")
def driver() -> Iterator[webdriver.Chrome]:
    """A browser without a network."""
    options = webdriver.ChromeOptions()
    options.binary_location = str(chromium())
    for flag in (
        "--headless=new",
        "--no-sandbox",  # which root has to do without
        "--disable-dev-shm-usage",
        "--enable-unsafe-swiftshader",
        "--window-size=1600,1300",
        "--host-resolver-rules=MAP * ~NOTFOUND",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(chromium_driver())
    started = webdriver.Chrome(options=options, service=service)
    yield started
    started.quit()


@pytest.fixture
def page(driver: webdriver.Chrome) -> Iterator[Page]:
    """The browser, whose console must stay free of errors."""
    driver.get("about:blank")
    opened = Page(driver)
    opened.complaints()  # those of the test before are its own
    yield opened
    assert opened.complaints() == []
