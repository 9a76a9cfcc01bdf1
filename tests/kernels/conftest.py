"""Where a kernel test runs: the reference on the CPU, Triton interpreted on the CPU, or CUDA."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from slideformer.kernels import triton_support

Close = Callable[[Tensor, Tensor, int], None]


@pytest.fixture(params=["reference", "interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[torch.device]:
    """Device of the tensors; decides with it which implementation the public functions take."""
    if request.param == "interpreter":
        if os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("Triton compiles its kernels in this process")
        pytest.importorskip("triton")
        monkeypatch.setattr(triton_support, "interpret", True)
    with warnings.catch_warnings():
        if request.param == "interpreter":
            # NumPy remarks on every infinity and NaN, which are meant.
            warnings.simplefilter("ignore", RuntimeWarning)
        yield torch.device("cuda" if request.param == "cuda" else "cpu")


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def close() -> Close:
    """Assert that a result is its float64 ideal but for the roundings that its dtype allows."""

    def check(result: Tensor, ideal: Tensor, roundings: int = 1) -> None:
        # A whole bf16 unit in the last place each: Triton's interpreter truncates.
        bf16 = result.dtype == torch.bfloat16
        rtol = roundings * 2.0**-7 if bf16 else 2e-5
        # Sums of FP32 terms that cancel leave an error in proportion to the terms, not the result.
        atol = 4e-6 * max(1.0, float(ideal.abs().max())) if ideal.numel() else 0.0
        torch.testing.assert_close(result.double().cpu(), ideal.cpu(), rtol=rtol, atol=atol)

    return check
