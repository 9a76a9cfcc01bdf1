"""Matrix products of layers and of the output matrix: how many FLOPs, which kind, which size."""

from __future__ import annotations

from slideformer.graph.model import ModelSpec, UnitSpec
from slideformer.graph.plan import MemoryPlan, keeps_attention
from slideformer.graph.tasks import Product, ProductKind

ATTENTION_BACKWARD = 2.5
"""Products of attention's backward over those of its forward: five for two (Dao, 2023)."""


def forward_products(
    spec: ModelSpec, unit: UnitSpec, rows: int, seq_len: int
) -> tuple[Product, ...]:
    """One layer's forward: 2 FLOPs per weight and token, and 2·S²·H·D a row for attention.

    Of experts, the weights that a token uses count, and as tokens those that one expert gets.
    """
    tokens = rows * seq_len
    attention = 2 * seq_len * seq_len * spec.heads * spec.head_dim * rows
    at_once = max(1, int(unit.token_share * tokens))
    return (
        Product(ProductKind.FORWARD, 2 * unit.matrix_numel * tokens, at_once, spec.hidden),
        Product(ProductKind.ATTENTION, attention, seq_len, spec.head_dim),
    )


def model_flops(spec: ModelSpec, seq_len: int) -> float:
    """FLOPs that training takes for each token of a row of one document, recompute left out.

    Forward once, backward the same for the gradients of inputs and again for those of weights,
    which what is frozen has none of (Chowdhery et al., PaLM, arXiv 2204.02311, appendix B, with
    attention below the diagonal only).
    """
    total = (3.0 - spec.head.frozen) * 2 * spec.vocab * spec.hidden
    for unit in spec.layers:
        weights, attention = forward_products(spec, unit, 1, seq_len)
        total += ((3 - unit.frozen) * weights.flops + 3 * attention.flops) / seq_len
    return total


def backward_products(
    spec: ModelSpec, unit: UnitSpec, plan: MemoryPlan, *, kept: bool
) -> tuple[Product, ...]:
    """One layer's recompute and backward on a micro-batch.

    Of a frozen layer, backward is the gradient of its input alone. Recompute leaves the down
    projection out, and from what is ``kept`` only attention is computed again, if that. Norms of
    outputs need those outputs, so these are made again in any case.
    """
    tokens = plan.micro_tokens
    forward, attention = forward_products(spec, unit, plan.micro_rows, plan.seq_len)
    summed = plan.micro_batches > 1 and not unit.frozen
    gradient = ProductKind.SUMMED if summed else ProductKind.GRADIENT
    attended = (
        ATTENTION_BACKWARD if kept and keeps_attention(spec, plan) else ATTENTION_BACKWARD + 1
    )
    again = 0 if kept else forward.flops - 2 * spec.hidden * spec.intermediate * tokens
    if spec.output_norms:
        outputs = spec.heads * spec.head_dim + spec.intermediate
        again += 2 * spec.hidden * outputs * tokens
    found = (
        Product(ProductKind.FORWARD, again, forward.tokens, spec.hidden),
        Product(gradient, (2 - unit.frozen) * forward.flops, forward.tokens, spec.hidden),
        Product(
            ProductKind.ATTENTION, round(attended * attention.flops), plan.seq_len, spec.head_dim
        ),
    )
    return found if again else found[1:]


def head_products(
    spec: ModelSpec, plan: MemoryPlan, vocab_rows: int, products: int
) -> tuple[Product, ...]:
    """That many products of a micro-batch with ``vocab_rows`` rows of the output matrix."""
    flops = products * 2 * vocab_rows * spec.hidden * plan.micro_tokens
    tile = min(plan.head_tile, plan.micro_tokens)
    return (Product(ProductKind.HEAD, flops, tile, spec.hidden),)
