"""``triton.jit`` with a type, which Triton does not ship. Importing this module imports Triton."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton

jit: Callable[[Callable[..., Any]], Any] = triton.jit
"""Compile a function for the GPU; launch it as ``kernel[grid](arguments, num_warps=...)``."""
