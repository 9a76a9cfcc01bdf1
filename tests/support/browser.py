"""Where Chromium and its driver are, if they are."""

from __future__ import annotations

import shutil


def chromium() -> str | None:
    """The browser, or None unless its driver is there too."""
    found = shutil.which("chromium") or shutil.which("google-chrome")
    return found if chromium_driver() else None


def chromium_driver() -> str | None:
    """What Selenium speaks to."""
    return shutil.which("chromedriver")
