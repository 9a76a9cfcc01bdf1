"""The sizes that follow from a plan."""

from __future__ import annotations

from slideformer.graph.plan import Compute
from tests.support.specs import small_plan


def test_sizes_of_a_step() -> None:
    plan = small_plan(rows=6, micro_rows=2, seq_len=8)
    assert (plan.micro_batches, plan.micro_tokens, plan.tokens) == (3, 16, 48)


def test_sums_of_several_contributions_are_kept_in_fp32() -> None:
    one = small_plan(rows=2, micro_rows=2)
    assert (one.layer_accumulator, one.head_accumulator) == (2, 2)
    tiled = small_plan(rows=2, micro_rows=2, head_tile=15)
    assert (tiled.layer_accumulator, tiled.head_accumulator) == (2, 4)
    several = small_plan(rows=4, micro_rows=2)
    assert (several.layer_accumulator, several.head_accumulator) == (4, 4)
    fp32 = small_plan(compute=Compute.FP32, rows=2, micro_rows=2)
    assert (fp32.layer_accumulator, fp32.head_accumulator) == (4, 4)
