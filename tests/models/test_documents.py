"""Attention within documents, on the CPU and, on a GPU, in one kernel."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slideformer.models.attention import RecordedAttention, Scores, attention
from slideformer.models.documents import Documents, StepDocuments, packed_tensors

SCALE = 0.3


def documents(lengths: list[int], window: int | None, device: str = "cpu") -> Documents:
    starts = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    return Documents(starts, tuple(lengths), window)


def block_mask(lengths: list[int], window: int | None) -> Tensor:
    """True where query i may see key j of the whole micro-batch."""
    number = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    distance = torch.arange(len(number))[:, None] - torch.arange(len(number))
    return (number[:, None] == number) & (distance >= 0) & (distance < (window or 1 << 30))


def heads(tokens: int, count: int, seed: int, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, tokens, count, 16, generator=generator).to(device)


@settings(max_examples=20)
@given(
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=6),
    window=st.one_of(st.none(), st.integers(1, 8)),
    kv_heads=st.sampled_from([1, 2, 4]),
)
def test_it_equals_attention_under_a_block_diagonal_mask(
    lengths: list[int], window: int | None, kv_heads: int
) -> None:
    total = sum(lengths)
    q, k, v = heads(total, 4, 0), heads(total, kv_heads, 1), heads(total, kv_heads, 2)
    gradient = heads(total, 4, 3)
    packed = RecordedAttention(q, k, v, Scores(SCALE, documents(lengths, window)))
    masked = RecordedAttention(q, k, v, Scores(SCALE, block_mask(lengths, window)))
    torch.testing.assert_close(packed.output, masked.output)
    for ours, expected in zip(packed.backward(gradient), masked.backward(gradient), strict=True):
        torch.testing.assert_close(ours, expected)


def test_half_precision_heads_on_a_device_go_through_one_kernel() -> None:
    """Shapes only: the meta device knows the kernel's signature, as a GPU would call it."""
    q, k = (torch.empty(2, 8, n, 16, dtype=torch.bfloat16, device="meta") for n in (4, 2))
    mask = documents([5, 3, 8], 4, "meta")
    recorded = RecordedAttention(q, k, k, Scores(SCALE, mask))
    assert recorded.output.shape == q.shape
    dq, dk, dv = recorded.backward(torch.empty_like(q))
    assert (dq.shape, dk.shape, dv.shape) == (q.shape, k.shape, k.shape)


def test_a_steps_documents_by_micro_batch() -> None:
    positions = torch.tensor([[0, 1, 2, 0], [0, 0, 1, 2], [0, 1, 2, 3], [0, 1, 0, 1]])
    step = StepDocuments.of(positions, 2)
    assert step.lengths == ((3, 1, 1, 3), (4, 2, 2))
    view = torch.full((4 * (2 * 16 + 2),), 77, dtype=torch.uint8)
    target = packed_tensors(view, 16, 2)
    step.write(target)
    assert target.positions.tolist() == positions.view(-1).tolist()
    assert target.starts[0, :5].tolist() == [0, 3, 4, 5, 8]
    assert target.starts[1, :4].tolist() == [0, 4, 6, 8]


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("size", [64, 128])
def test_one_kernel_equals_a_block_diagonal_mask(window: int | None, size: int) -> None:
    lengths = [300, 1, 17, 194, 512]
    total = sum(lengths)
    generator = torch.Generator().manual_seed(0)
    q, k, v, gradient = (
        torch.randn(2, total // 2, n, size, generator=generator).cuda().bfloat16()
        for n in (8, 2, 2, 8)
    )
    where = documents(lengths, window, "cuda")
    memory = torch.cat([where.starts, where.starts])  # of a run: what lies beside is overwritten
    where = where._replace(starts=memory[: len(where.starts)])
    packed = RecordedAttention(q, k, v, Scores(0.1, where))
    memory[len(where.starts) :].zero_()
    wide = [t.float().view(1, total, -1, size) for t in (q, k, v)]
    masked = RecordedAttention(
        wide[0], wide[1], wide[2], Scores(0.1, block_mask(lengths, window).cuda())
    )
    torch.testing.assert_close(
        packed.output.float().view(1, total, -1, size), masked.output, rtol=0.02, atol=0.02
    )
    expected = masked.backward(gradient.float().view(1, total, -1, size))
    for ours, wanted in zip(packed.backward(gradient), expected, strict=True):
        torch.testing.assert_close(
            ours.float().view(1, total, -1, size), wanted, rtol=0.03, atol=0.05
        )
    again = attention(q, k, v, Scores(0.1, documents(lengths, window, "cuda")))
    assert torch.equal(again, packed.output)
