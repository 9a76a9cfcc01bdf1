"""Fixtures of the tests that use pages."""

from __future__ import annotations

from tests.support.browser import driver, page

__all__ = ["driver", "page"]
