"""The split master holds every FP32 value exactly, and its high half is the BF16 weight."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from slideformer.kernels import split
from slideformer.kernels.split import join_master, split_master

NAN = (0x7FC0, 0)
EDGES = [
    0x00000000,
    0x80000000,  # -0
    0x00000001,  # smallest subnormal
    0x007FFFFF,
    0x00007FFF,
    0x00008000,  # a tie: away from zero
    0x3F808000,
    0x3F818000,
    0xBF808000,
    0x3F807FFF,
    0x7F7F7FFF,  # the last value that BF16 does not round to infinity
    0x7F7F8000,
    0x7F7FFFFF,  # largest finite
    0xFF7FFFFF,
    0x7F800000,  # infinity
    0xFF800000,
    0x7F800001,  # NaN
    0x7FFFFFFF,
    0xFFFFFFFF,
    0xFF800001,
]


def from_bits(bits: list[int] | np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(bits, dtype=np.uint32).view(np.float32).copy())


def to_bits(values: Tensor) -> list[int]:
    bits: list[int] = values.cpu().numpy().view(np.uint32).tolist()
    return bits


def halves(src: Tensor) -> tuple[Tensor, Tensor]:
    hi = torch.full(src.shape, -1, dtype=torch.int16, device=src.device)
    lo = torch.full_like(hi, -1)
    split_master(src, hi, lo)
    return hi, lo


def joined(hi: Tensor, lo: Tensor) -> Tensor:
    out = torch.empty(hi.shape, device=hi.device)
    join_master(hi, lo, out)
    return out


def expected_halves(bits: int) -> tuple[int, int]:
    """The definition, on unbounded integers."""
    if bits & 0x7FFFFFFF > 0x7F800000:
        return NAN
    hi = (bits + 0x8000) >> 16
    return hi, bits - (hi << 16)


@given(hnp.arrays(np.uint32, st.integers(0, 40)))
@settings(max_examples=60)
def test_halves_follow_the_definition_and_join_to_the_same_bits(bits: np.ndarray) -> None:
    check(from_bits(bits))


def test_edge_values() -> None:
    check(from_bits(EDGES))


def check(values: Tensor) -> None:
    hi, lo = halves(values)
    found = list(zip(hi.numpy().view(np.uint16).tolist(), lo.tolist(), strict=True))
    assert found == [expected_halves(b) for b in to_bits(values)]
    exact = [0x7FC00000 if v != v else b for v, b in zip(values, to_bits(values), strict=True)]
    assert to_bits(joined(hi, lo)) == exact


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_float_is_kept(dtype: torch.dtype) -> None:
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    hi, lo = halves(values)
    back = joined(hi, lo)
    assert torch.equal(back.isnan(), values.isnan())
    assert torch.equal(back[~back.isnan()], values[~values.isnan()].float())
    if dtype == torch.bfloat16:
        assert not lo.any()
        same = hi == values.view(torch.int16)
        assert torch.equal(same | values.isnan(), torch.ones_like(same))


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
@settings(max_examples=100)
def test_high_half_is_the_nearest_bf16(value: float) -> None:
    hi, _ = halves(torch.tensor([value]))
    rounded = hi.view(torch.bfloat16)
    nearest = torch.tensor([value]).bfloat16()
    if not torch.equal(rounded, nearest):  # only a tie, which PyTorch rounds to even
        bits = struct.unpack("<I", struct.pack("<f", value))[0]
        assert bits & 0xFFFF == 0x8000
        assert abs(rounded.double().item()) > abs(value)


class LargestAllocation(TorchDispatchMode):
    """Notes the largest storage that an operation makes."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.known = {x.untyped_storage().data_ptr() for x in known}
        self.nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN204
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in self.known:
            self.nbytes = max(self.nbytes, out.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_tensors_go_in_chunks(dtype: torch.dtype) -> None:
    n = 3 * split._CHUNK + 5
    src = torch.randn(n, generator=torch.Generator().manual_seed(0)).to(dtype)
    hi, lo = torch.empty(n, dtype=torch.int16), torch.empty(n, dtype=torch.int16)
    out = torch.empty(n)
    with LargestAllocation([src, hi, lo, out]) as largest:
        split_master(src, hi, lo)
        join_master(hi, lo, out)
    assert 0 < largest.nbytes <= 8 << 20
    assert torch.equal(out, src.float())


def test_matrices_and_empty_tensors() -> None:
    values = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    hi, lo = torch.empty(15, dtype=torch.int16), torch.empty(15, dtype=torch.int16)
    split_master(values, hi, lo)
    assert torch.equal(joined(hi, lo).view(3, 5), values)
    split_master(torch.empty(0), hi[:0], lo[:0])
    join_master(hi[:0], lo[:0], torch.empty(0))


@pytest.mark.parametrize(
    ("src", "hi", "error"),
    [
        (torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.int16), TypeError),
        (torch.zeros(4), torch.zeros(4, dtype=torch.int32), TypeError),
        (torch.zeros(4), torch.zeros(5, dtype=torch.int16), ValueError),
        (torch.zeros(8)[::2], torch.zeros(4, dtype=torch.int16), ValueError),
        (torch.zeros(4), torch.zeros(4, dtype=torch.int16, device="meta"), ValueError),
    ],
)
def test_wrong_tensors_are_refused(src: Tensor, hi: Tensor, error: type[Exception]) -> None:
    with pytest.raises(error):
        split_master(src, hi, torch.zeros(4, dtype=torch.int16))
    with pytest.raises(error):
        join_master(hi, torch.zeros(4, dtype=torch.int16), src)


@pytest.mark.gpu
def test_cuda_gives_the_bits_of_the_cpu() -> None:
    random = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint32)
    values = torch.cat([from_bits(EDGES), from_bits(random)])
    hi, lo = halves(values.cuda())
    expected_hi, expected_lo = halves(values)
    assert torch.equal(hi.cpu(), expected_hi)
    assert torch.equal(lo.cpu(), expected_lo)
    assert to_bits(joined(hi, lo)) == to_bits(joined(expected_hi, expected_lo))
