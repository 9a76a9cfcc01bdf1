"""FLOPs of layers and of the output matrix, by kind and size."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

from slideformer.graph.model import ParamGroup, UnitKind, layout_unit
from slideformer.graph.products import (
    backward_products,
    forward_products,
    head_products,
    model_flops,
)
from slideformer.graph.tasks import Product, ProductKind
from tests.support.specs import small_plan, small_spec

SPEC = small_spec(hidden=4, intermediate=8, heads=2, kv_heads=1, head_dim=2, vocab=3)
LAYER = SPEC.layers[0]
WEIGHTS = 4 * (4 + 2 + 2) + 4 * 4 + 2 * 8 * 4 + 4 * 8


def test_forward_of_a_layer() -> None:
    assert LAYER.matrix_numel == WEIGHTS
    # Scores and their product with the values: each 2·S²·H·D, half of it under the causal mask.
    assert forward_products(SPEC, LAYER, rows=3, seq_len=5) == (
        Product(ProductKind.FORWARD, 2 * WEIGHTS * 15, 15, 4),
        Product(ProductKind.ATTENTION, 3 * 2 * 25 * 2 * 2, 5, 2),
    )


def test_backward_of_a_layer() -> None:
    plan = small_plan(rows=3, micro_rows=3, seq_len=5)
    attention = 3 * 2 * 25 * 2 * 2
    down = 4 * 8
    assert backward_products(SPEC, LAYER, plan, kept=False) == (
        Product(ProductKind.FORWARD, 2 * (WEIGHTS - down) * 15, 15, 4),
        Product(ProductKind.GRADIENT, 4 * WEIGHTS * 15, 15, 4),
        Product(ProductKind.ATTENTION, attention * 7 // 2, 5, 2),
    )


def test_kept_activations_spare_the_recompute() -> None:
    plan = small_plan(rows=3, micro_rows=3, seq_len=5)
    attention = 3 * 2 * 25 * 2 * 2
    assert backward_products(SPEC, LAYER, plan, kept=True) == (
        Product(ProductKind.GRADIENT, 4 * WEIGHTS * 15, 15, 4),
        Product(ProductKind.ATTENTION, attention * 5 // 2, 5, 2),
    )
    packed = backward_products(SPEC, LAYER, replace(plan, packed=True), kept=True)
    assert packed[1].flops == attention * 7 // 2


def test_norms_of_outputs_need_the_outputs_again() -> None:
    plan = small_plan(rows=3, micro_rows=3, seq_len=5)
    outputs = 2 * (4 * 4 + 4 * 8) * 15
    spec = replace(SPEC, output_norms=True)
    for kept, made in ((False, 2 * (WEIGHTS - 4 * 8) * 15), (True, 0)):
        again = backward_products(spec, LAYER, plan, kept=kept)[0]
        assert again == Product(ProductKind.FORWARD, made + outputs, 15, 4)


def test_experts_count_by_what_a_token_uses() -> None:
    matrices = ParamGroup("gate_up.weight", (("w", (80, 4)),), True, Fraction(2, 8))
    dense = ParamGroup("o.weight", (("o", (4, 4)),), True)
    unit = layout_unit("L00", UnitKind.LAYER, [dense, matrices])
    product, _ = forward_products(SPEC, unit, rows=3, seq_len=8)
    assert product == Product(ProductKind.FORWARD, 2 * (16 + 80 * 4 // 4) * 24, 6, 4)


def test_gradients_of_several_micro_batches_are_sums() -> None:
    plan = small_plan(rows=4, micro_rows=2, seq_len=5)
    kinds = [p.kind for p in backward_products(SPEC, LAYER, plan, kept=False)]
    assert kinds == [ProductKind.FORWARD, ProductKind.SUMMED, ProductKind.ATTENTION]


def test_the_output_matrix() -> None:
    plan = small_plan(micro_rows=2, seq_len=8, head_tile=4)
    assert head_products(SPEC, plan, vocab_rows=2, products=3) == (
        Product(ProductKind.HEAD, 3 * 2 * 2 * 4 * 16, 4, 4),
    )


def test_training_takes_six_flops_a_weight_and_twelve_a_pair_below_the_diagonal() -> None:
    spec, seq_len = small_spec(), 64
    matrices = sum(unit.matrix_numel for unit in spec.layers) + spec.vocab * spec.hidden
    attention = 12 * len(spec.layers) * spec.heads * spec.head_dim * seq_len / 2
    assert model_flops(spec, seq_len) == 6 * matrices + attention
