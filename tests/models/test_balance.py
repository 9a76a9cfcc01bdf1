"""The load-balancing loss against that of transformers under autograd."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from slideformer.models.balance import Balance, balance_loss, real_tokens


@settings(max_examples=25)
@given(
    layers=st.integers(1, 3),
    micro=st.integers(1, 3),
    experts=st.integers(1, 6),
    chosen=st.integers(1, 3),
    tokens=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_loss_and_gradient_are_those_of_transformers(
    layers: int, micro: int, experts: int, chosen: int, tokens: int, seed: int
) -> None:
    """Counted layer by layer and micro-batch by micro-batch."""
    chosen = min(chosen, experts)
    generator = torch.Generator().manual_seed(seed)
    logits = [torch.randn(micro * tokens, experts, generator=generator) for _ in range(layers)]
    real = (torch.rand(micro * tokens, generator=generator) < 0.7).int()
    real[0] = 1
    statistics = torch.zeros(2 * experts + 1)
    parts = [slice(m * tokens, (m + 1) * tokens) for m in range(micro)]
    balance = Balance(statistics, real, 0.3)
    for layer in logits:
        for part in parts:
            probabilities = layer[part].softmax(-1)
            taken = probabilities.topk(chosen, dim=-1).indices.flatten()
            by_expert, order = torch.sort(taken, stable=True)
            ends = torch.searchsorted(by_expert, torch.arange(experts), right=True, out_int32=True)
            balance.part(part).add(probabilities, order // chosen, ends)

    inputs = [layer.clone().requires_grad_() for layer in logits]
    expected = 0.3 * load_balancing_loss_func(tuple(inputs), experts, chosen, real)
    assert float(balance_loss(statistics, 0.3)) == pytest.approx(float(expected.detach()), rel=1e-5)
    for layer, theirs in zip(logits, torch.autograd.grad(expected, inputs), strict=True):
        probabilities = layer.softmax(-1)
        upstream = torch.cat([balance.part(part).gradient() for part in parts])
        inner = (upstream * probabilities).sum(-1, keepdim=True)
        torch.testing.assert_close(probabilities * (upstream - inner), theirs, rtol=1e-4, atol=1e-7)


def test_tokens_count_up_to_the_last_that_is_learnt_in_their_document() -> None:
    none = -100
    rows = [  # targets, positions, which tokens count
        # The token at 4 is the last target.
        ([none, 5, none, 7, none, none], [0, 1, 2, 3, 4, 5], [1, 1, 1, 1, 1, 0]),
        ([1, 2, 3, 4, 5, none], [0, 1, 2, 3, 4, 5], [1] * 6),
        ([none] * 6, [0, 1, 2, 3, 4, 5], [0] * 6),
        # A token behind the last target is no one's, nor is a document of one token.
        ([1, none, none, 2, none, none], [0, 1, 2, 0, 1, 0], [1, 1, 0, 1, 1, 0]),
        ([none, 3, none, none, 6, none], [0, 0, 1, 0, 0, 1], [0, 1, 1, 0, 1, 1]),
        ([none, none, none, none, 1, none], [0, 1, 0, 1, 2, 3], [0, 0, 1, 1, 1, 1]),
    ]
    targets, positions, expected = (
        torch.tensor(column).flatten() for column in zip(*rows, strict=True)
    )
    assert torch.equal(real_tokens(targets, positions), expected.int())
