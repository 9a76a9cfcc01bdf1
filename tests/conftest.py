"""What all tests share: no randomness in Hypothesis, no network, Triton interpreted, GPU skips."""

from __future__ import annotations

import gc
import os

# Set before any test module imports the libraries that read them once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from slideformer import profiles, this_machine

HAS_CUDA = torch.cuda.is_available()

if not HAS_CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel's module is imported

settings.register_profile("ci", derandomize=True, deadline=None)
settings.load_profile("ci")


@pytest.fixture(scope="session", autouse=True)
def _nothing_measured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Plans do not depend on whether this machine was measured."""
    folder = tmp_path_factory.mktemp("profiles")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profiles, "cache_folder", lambda: folder)
        yield


@pytest.fixture(scope="session", autouse=True)
def _some_cores() -> Iterator[None]:
    """Runs may have four threads, whatever this machine has."""
    cores = max(4, this_machine.usable_cores())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(this_machine, "usable_cores", lambda: cores)
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what carries the marker ``gpu`` where there is no CUDA device."""
    if HAS_CUDA:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    """Leave what the imports made out of garbage collections: they took a fifth of the time."""
    gc.collect()
    gc.freeze()
