"""How long a step must take under a plan: the busiest lane's work, in closed form.

One decoder layer stands for all, so the bound takes microseconds where simulating takes a tenth of
a second. It ranks candidates; the plan that is chosen is then simulated.
"""

from __future__ import annotations

from collections import Counter

from slideformer.graph.model import ModelSpec
from slideformer.graph.plan import MachineProfile, MemoryPlan, kept_nbytes
from slideformer.graph.products import backward_products, forward_products, head_products
from slideformer.memory.nvme_needs import nvme_seconds

OVERLAP_LOSS = 0.12
"""Share of the second busiest lane that even a good order leaves exposed."""

NARROW_LOSS = 0.005
"""What a window of two units costs: a load starts only when the unit before last is done."""

LAUNCH_SECONDS = 60e-6 * 40
"""What launching one layer's kernels on one micro-batch takes at least, forward and backward."""


def step_bound(spec: ModelSpec, plan: MemoryPlan, profile: MachineProfile) -> float:
    """Seconds of a step that no order can go below, and a little for imperfect overlap."""
    compute = _compute(spec, plan, profile)
    lanes = sorted([compute + _exposed(spec, plan, profile), *_others(spec, plan, profile)])
    narrow = NARROW_LOSS if plan.window < 3 else 0.0
    return (lanes[-1] + OVERLAP_LOSS * lanes[-2]) * (1 + narrow)


def _compute(spec: ModelSpec, plan: MemoryPlan, profile: MachineProfile) -> float:
    layers, layer = len(spec.layers), spec.layers[0]
    micro, rates, keeps = plan.micro_batches, profile.products, plan.keeps(layers)
    seconds = layers * rates.seconds(forward_products(spec, layer, plan.micro_rows, plan.seq_len))
    kinds = Counter((spec.layers[i].frozen, i in keeps) for i in _backward(spec))
    for (frozen, kept), count in kinds.items():
        like = next(unit for unit in spec.layers if unit.frozen is frozen)
        seconds += count * rates.seconds(backward_products(spec, like, plan, kept=kept))
    products = (3 if plan.vocab_chunks == 1 else 4) - spec.head.frozen
    seconds += rates.seconds(head_products(spec, plan, spec.vocab, products))
    seconds = micro * max(seconds, layers * LAUNCH_SECONDS)
    resident, streamed = _trained(spec, plan)
    moved = 26 * resident + 6 * streamed
    return seconds + moved / profile.gpu_copy


def _backward(spec: ModelSpec) -> range:
    """Positions of the layers that have a backward."""
    return range(spec.lowest_trained, len(spec.layers))


def _trained(spec: ModelSpec, plan: MemoryPlan) -> tuple[int, int]:
    """Elements of the trained units that are resident, and of those that are not."""
    numels = [0, 0]
    for unit in spec.units:
        if not unit.frozen:
            numels[unit.name not in plan.resident] += unit.numel
    return numels[0], numels[1]


def _others(spec: ModelSpec, plan: MemoryPlan, profile: MachineProfile) -> list[float]:
    """Seconds of work of all other lanes."""
    size = plan.compute.nbytes
    resident = sum(spec.unit(name).numel for name in plan.resident)
    streamed = spec.param_count - resident
    boundary = plan.tokens * spec.hidden * size
    spilled = plan.spilled * plan.micro_batches * kept_nbytes(spec, plan)
    layer_numel = spec.layers[0].numel
    back = sum(spec.layers[i].name not in plan.resident for i in _backward(spec))
    again = max(0, back - plan.window)
    up = (streamed + again * layer_numel) * size + plan.offloaded * boundary + spilled
    _, updated = _trained(spec, plan)
    down = updated * size + plan.offloaded * boundary + spilled
    # The last layer's update is due before its forward, and the next gradient comes after the loss;
    # deferred, `_exposed` counts what forward does not hide.
    rates, micro = profile.products, plan.micro_batches
    forward = micro * rates.seconds(
        forward_products(spec, spec.layers[0], plan.micro_rows, plan.seq_len)
    )
    idle = forward + micro * rates.seconds(head_products(spec, plan, spec.vocab, 3))
    if spec.head.name in plan.resident:  # then it is the last layer's
        idle += 3 * forward
    return [
        up / profile.h2d,
        down / profile.d2h,
        updated / profile.update + (0.0 if plan.deferred else idle) if updated else 0.0,
        *nvme_seconds(spec, plan, profile),
    ]


def _exposed(spec: ModelSpec, plan: MemoryPlan, profile: MachineProfile) -> float:
    """Seconds in which the compute lane waits whatever the order.

    Between the last backward and the next forward nothing hides what is due first; forward waits
    for spilled activations that go down, between boundaries, slower than it makes them, and
    deferred, for updates that it does not hide.
    """
    layer = spec.layers[0]
    forward = plan.micro_batches * profile.products.seconds(
        forward_products(spec, layer, plan.micro_rows, plan.seq_len)
    )
    forward *= len(spec.layers)
    spilled = plan.spilled * plan.micro_batches * kept_nbytes(spec, plan)
    boundaries = plan.offloaded * plan.tokens * spec.hidden * plan.compute.nbytes
    seconds = max(0.0, (spilled + boundaries) / profile.d2h - forward) if spilled else 0.0
    rest = _trained(spec, plan)[1]
    if "embed" not in plan.resident and not spec.embed.frozen:
        used = (spec.vocab if plan.deferred else min(plan.tokens, spec.vocab)) * spec.hidden
        rest -= used
        boundary = plan.tokens * spec.hidden * plan.compute.nbytes
        seconds += used / profile.update + 2 * boundary / profile.host_copy
    if layer.name not in plan.resident and not layer.frozen:
        rest -= layer.numel
        seconds += layer.numel / profile.update
    if plan.deferred:
        seconds += max(0.0, rest / profile.update - forward)
    return seconds
