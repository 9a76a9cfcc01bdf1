"""Row addressing of strided tensors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slideformer.kernels.triton_support import row_strides


@given(
    shape=st.lists(st.integers(1, 4), min_size=0, max_size=3),
    padding=st.integers(0, 2),
    swap=st.booleans(),
)
def test_rows_are_where_the_strides_say(shape: list[int], padding: int, swap: bool) -> None:
    # A slice of a wider buffer, its last leading dimension perhaps stored first.
    buffer = torch.arange(8 * torch.Size(shape).numel() * (padding + 1))
    if swap and len(shape) > 1:
        stored = buffer.view(shape[-1], *shape[:-1], -1)
        x = stored[..., :3].movedim(0, -2)
    else:
        x = buffer.view(*shape, -1)[..., :3]

    inner, (outer_stride, inner_stride) = row_strides(x)

    for row, values in enumerate(x.reshape(-1, 3)):
        start = row // inner * outer_stride + row % inner * inner_stride
        assert values[0] == start


def test_one_uneven_tensor_splits_the_rows_of_all() -> None:
    plain, view = torch.zeros(5, 3, 4), torch.zeros(5, 20)[:, :12].view(5, 3, 4)
    assert row_strides(plain, plain) == (1, (4, 0, 4, 0))
    assert row_strides(plain, view) == (3, (12, 4, 20, 4))


def test_a_broadcast_dimension_does_not_merge() -> None:
    x = torch.zeros(4, 1, 6).expand(4, 3, 6)
    assert row_strides(x) == (3, (6, 0))


def test_refuses_rows_in_three_dimensions() -> None:
    x = torch.zeros(4, 5, 6, 8)[:, :3, :2]
    with pytest.raises(ValueError, match=r"shape \(4, 3, 2, 8\).*evenly spaced"):
        row_strides(x)
