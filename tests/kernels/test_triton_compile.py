"""The kernels compile for Hopper, with 16-byte accesses; the interpreter accepts more than that."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    environment["PYTHONPATH"] = str(HERE.parent.parent)
    done = subprocess.run(
        [sys.executable, HERE / "compile_for_hopper.py"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_kernel_moves_16_bytes_at_once(facts: dict[str, dict[str, int]]) -> None:
    assert len(facts) == 19
    for case, counts in facts.items():
        assert counts["wide_loads"] > 0, case
        # These store no more than three numbers a row.
        few = case.startswith("lse") or case in ("row_products", "squares")
        assert counts["wide_stores"] > 0 or few, case


def test_grouped_gradients_run_on_tensor_cores(facts: dict[str, dict[str, int]]) -> None:
    assert facts["grouped_gradient"]["tensor_cores"] > 0


def test_the_norm_backward_prefetches_its_next_rows(facts: dict[str, dict[str, int]]) -> None:
    # Three inputs of 8 KiB a row, each thread 16 bytes at a time, for one row ahead.
    assert facts["rms_norm_backward"]["prefetches"] >= 6
