"""Grouped products against one product per group."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slideformer.models import grouped
from slideformer.models.grouped import grouped_gradient_, grouped_product


def problem(
    sizes: list[int], n: int, m: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows [R, m], their gradients [R, n], matrices [G, n, m] and the groups' ends."""
    generator = torch.Generator().manual_seed(sum(sizes))
    count = sum(sizes)
    rows, d_rows = (torch.randn(count, width, generator=generator) for width in (m, n))
    matrices = torch.randn(len(sizes), n, m, generator=generator)
    ends = torch.tensor(sizes).cumsum(0).int()
    return (*(t.to(device, dtype) for t in (rows, d_rows, matrices)), ends.to(device))  # type: ignore[return-value]


def check(sizes: list[int], n: int, m: int, accumulate: bool, dtype: Any, device: str) -> None:
    rows, d_rows, matrices, ends = problem(sizes, n, m, dtype, device)
    out_dtype = torch.float32 if accumulate else dtype
    start = torch.randn(matrices.shape, device=device) if accumulate else None
    out = torch.full(matrices.shape, torch.nan, dtype=out_dtype, device=device)
    if start is not None:
        out.copy_(start)
    product = grouped_product(rows, matrices.mT, ends)
    grouped_gradient_(out, d_rows, rows, ends, accumulate=accumulate)
    limit = 1e-5 if dtype is torch.float32 else 1e-2
    begin = 0
    for group, size in enumerate(sizes):
        part = slice(begin, begin + size)
        begin += size
        ideal = rows[part].double() @ matrices[group].double().T
        assert float((product[part] - ideal).norm()) <= limit * float(ideal.norm())
        gradient = d_rows[part].double().T @ rows[part].double()
        if start is not None:
            gradient += start[group]
        assert float((out[group] - gradient).norm()) <= limit * float(gradient.norm()) + 1e-12


@settings(max_examples=30)
@given(
    sizes=st.lists(st.integers(0, 5), min_size=1, max_size=5),
    n=st.integers(1, 9),
    m=st.integers(1, 9),
    accumulate=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_groups(sizes: list[int], n: int, m: int, accumulate: bool, dtype: Any) -> None:
    check(sizes, n, m, accumulate, dtype, "cpu")


@pytest.mark.parametrize("piece", [2**26, 3 * 64 * 16])
@pytest.mark.parametrize("accumulate", [False, True])
def test_the_gpus_way_gives_the_same(
    piece: int, accumulate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's grouped product runs on the CPU too; here through pieces, with an empty group."""
    monkeypatch.setattr(grouped, "_one_kernel", lambda rows: True)
    monkeypatch.setattr(grouped, "PIECE", piece)
    check([5, 0, 12], 40, 64, accumulate, torch.float32, "cpu")


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("accumulate", [False, True])
def test_gpu_bf16_with_empty_groups(accumulate: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped, "PIECE", 6 * 512 * 128)
    sizes = [162, 0, 577, 446, 0, 83]
    for _ in range(2):  # memory that comes back is not zero
        poison = torch.full((6, 768, 512), torch.nan, dtype=torch.bfloat16, device="cuda")
        del poison
        check(sizes, 768, 512, accumulate, torch.bfloat16, "cuda")
    rows, d_rows, matrices, ends = problem(sizes, 768, 512, torch.bfloat16, "cuda")
    out = torch.zeros_like(matrices)
    torch.cuda.set_sync_debug_mode("error")
    try:
        grouped_product(rows, matrices.mT, ends)
        grouped_gradient_(out, d_rows, rows, ends, accumulate=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
