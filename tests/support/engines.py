"""Engines on tiny checkpoints with any plan, and the plain PyTorch loop they are compared with."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from slideformer import engine as engine_module
from slideformer.checkpointing import Checkpoint
from slideformer.config import EngineConfig
from slideformer.engine import Engine
from slideformer.graph.model import ModelSpec
from slideformer.graph.plan import MemoryPlan
from slideformer.graph.step import compile_step
from slideformer.models.data.batches import Batch
from slideformer.models.data.batches import make_batch as make_rows
from slideformer.models.data.dataset import TokenDataset
from slideformer.models.data.packing import Rows
from slideformer.runtime.policies import Policy
from slideformer.schedule import Schedule
from tests.models.tiny import by_stored_name, joined, save, tiny_config, tiny_model
from tests.support.specs import draft

ROWS, SEQ_LEN, MICRO_ROWS = 4, 16, 2

Weights = dict[str, Tensor]


def load_model(folder: Path) -> Any:
    """A checkpoint as plain transformers reads it, in FP32; its SDPA may leave caps out."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if getattr(model.config, "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")
    return model


def write_model(folder: Path, variant: str = "llama", **settings: Any) -> Path:
    """A tiny checkpoint in FP32 of one of the variants of ``tests/models/tiny.py``."""
    return save(tiny_model(tiny_config(variant, **settings)), folder, torch.float32)


def make_batch(
    seed: int,
    *,
    vocab: int = 301,
    lengths: Sequence[int] | None = None,
    pad: int = 0,
    rows: int = ROWS,
) -> Batch:
    """Random rows, of ``lengths`` tokens each (default: all full), padded on the right.

    Some tokens in the middle carry no loss, as those of a prompt.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, vocab, (rows, SEQ_LEN), generator=generator)
    targets = torch.full_like(ids, -100)
    for row, length in enumerate(lengths or [SEQ_LEN] * rows):
        ids[row, length:] = pad
        if length:
            targets[row, : length - 1] = ids[row, 1:length]
    targets[0, 3:6] = -100
    real = sum(lengths or [SEQ_LEN] * rows)
    count = int((targets != -100).sum())
    return Batch(ids, targets, real, count, rows)


def packed_batch(
    seed: int, documents: Sequence[Sequence[int]], *, vocab: int = 301, seq_len: int = SEQ_LEN
) -> Batch:
    """Rows of random documents of these lengths, padded on the right."""
    generator = np.random.default_rng(seed)
    lengths = [length for row in documents for length in row]
    dataset = TokenDataset.from_arrays(
        generator.integers(1, vocab, sum(lengths), dtype=np.int32),
        np.cumsum([0, *lengths]),
        generator.random(sum(lengths)) < 0.8,
        seq_len=seq_len,
    )
    rows = Rows(np.arange(len(lengths)), np.cumsum([0, *map(len, documents)]))
    return make_rows(dataset, rows, len(documents), packed=True)


def config_for(folder: Path, **changes: Any) -> EngineConfig:
    """Settings for the CPU and the batches of `make_batch`; ``changes`` replace them."""
    fields: dict[str, Any] = {
        "model": folder,
        "batch_size": ROWS,
        "seq_len": SEQ_LEN,
        "micro_batch": MICRO_ROWS,
        "compute": "fp32",
        "device": "cpu",
        "lr": 1e-3,
    }
    return EngineConfig(**{**fields, **changes})


@contextmanager
def engine_with(
    config: EngineConfig,
    *,
    policy: Policy | None = None,
    checkpoint: Checkpoint | None = None,
    gradient_slots: int = 0,
    seed: int = 0,
    **plan: Any,
) -> Iterator[Engine]:
    """An engine that runs by a plan with these fields, whatever the planner would have chosen.

    With ``gradient_slots`` the parked gradients are dealt out to so many slots at random.
    """

    def planned(*args: Any) -> MemoryPlan:
        drawn = replace(draft(original(*args)), resident=frozenset(), kept=0, spilled=0)
        drawn = replace(drawn, **plan)
        if gradient_slots:
            spec: ModelSpec = engine_module.spec_for(args[0], args[1])
            parked = sum(name.startswith("gh.") for name in compile_step(spec, drawn).buffers)
            dealt = random.Random(seed).choices(range(gradient_slots), k=parked)
            drawn = replace(drawn, gradient_slots=gradient_slots, gradient_slot=tuple(dealt))
        return drawn

    original = engine_module.plan_for
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "plan_for", planned)
        engine = Engine(config, policy=policy, checkpoint=checkpoint)
    with engine:
        yield engine


class Trained(NamedTuple):
    """What an engine's steps gave, and weights and all state behind the last of them."""

    losses: list[float]
    norms: list[float]
    weights: Weights
    state: dict[str, Tensor]


def train(
    config: EngineConfig, batches: Sequence[Batch], *, lr: Schedule | None = None, **plan: Any
) -> Trained:
    """Train an engine by a plan with these fields; a schedule counts steps from 0."""
    with engine_with(config, **plan) as engine:
        rates = [None if lr is None else lr(step) for step in range(len(batches))]
        handles = [engine.step(batch, lr=rate) for batch, rate in zip(batches, rates, strict=True)]
        losses = [handle.loss() for handle in handles]
        norms = [handle.gradient_norm() for handle in handles]
        return Trained(losses, norms, weights_of(engine), state_of(engine))


def weights_of(engine: Engine) -> Weights:
    """All parameters in FP32 by name, once everything submitted is done."""
    engine.synchronize()
    states = {unit.name: engine._memory.whole(unit.name) for unit in engine.spec.units}
    masters = {
        name: (state.hi, state.lo if len(state.lo) else torch.zeros_like(state.hi))
        for name, state in states.items()
    }
    return {key: value.clone() for key, value in joined(engine.spec, masters)}


def state_of(engine: Engine) -> dict[str, Tensor]:
    """All bits of masters and moments, padding included, wherever they lie."""
    engine.synchronize()
    states = {unit.name: engine._memory.whole(unit.name) for unit in engine.spec.units}
    return {
        f"{name}.{part}": getattr(state, part).clone()
        for name, state in states.items()
        for part in ("hi", "lo", "m", "v", "scales")
    }


def different(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[str]:
    """Names whose bits differ."""
    assert one.keys() == other.keys()
    return [
        name
        for name, value in one.items()
        if not torch.equal(value.view(torch.uint8), other[name].view(torch.uint8))
    ]


def stored_weights(folder: Path) -> Weights:
    """The parameters of a checkpoint as plain transformers reads them, in FP32."""
    model = load_model(folder)
    return _weights(model)


@dataclass
class Reference:
    """What a plain loop over the transformers model gives."""

    losses: list[float]
    norms: list[float]
    weights: Weights
    with_gradient: set[str]


def train_reference(
    folder: Path,
    batches: Sequence[Batch],
    *,
    lr: float | Schedule = 1e-3,
    weight_decay: float = 0.0,
    groups: Callable[[str], dict[str, float]] = lambda name: {},
    max_norm: float | None = None,
    skipped: Collection[int] = (),
    frozen: Collection[str] = (),
    smoothing: float = 0.0,
    z: float = 0.0,
) -> Reference:
    """FP32, the same micro-batches, `torch.optim.AdamW`; padding is masked for attention.

    Weight decay is on matrices; ``groups`` replaces a parameter's ``lr`` and ``weight_decay``, and
    those of ``frozen`` are not trained. A schedule, without groups, counts steps from 0, and so
    does ``skipped``: steps without an update. ``smoothing`` of labels and ``z`` loss are beside
    cross-entropy.
    """
    model = load_model(folder)
    for name, parameter in model.named_parameters():
        stored = by_stored_name(model.config, {name: parameter.detach()})
        parameter.requires_grad_(not stored.keys() <= set(frozen))
    optimizer = torch.optim.AdamW(
        [
            {
                "params": [parameter],
                "weight_decay": weight_decay if parameter.dim() > 1 else 0.0,
                **groups(name),
            }
            for name, parameter in model.named_parameters()
        ],
        lr=lr(0) if callable(lr) else lr,
    )
    result = Reference([], [], {}, set())
    for step, batch in enumerate(batches):
        if callable(lr):
            for group in optimizer.param_groups:
                group["lr"] = lr(step)
        optimizer.zero_grad()
        starts = range(0, len(batch.input_ids), MICRO_ROWS)
        losses = [backward(model, batch, start, smoothing, z) for start in starts]
        result.losses.append(sum(losses))
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        gradients = by_stored_name(model.config, gradients)
        result.norms.append(float(torch.nn.utils.get_total_norm(list(gradients.values()))))
        result.with_gradient |= {name for name, grad in gradients.items() if grad.any()}
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        if step not in skipped:
            optimizer.step()
    result.weights = _weights(model)
    return result


def _weights(model: Any) -> Weights:
    """A copy of its parameters by their names in a checkpoint."""
    named = by_stored_name(model.config, {n: p.detach() for n, p in model.named_parameters()})
    return {name: value.clone() for name, value in named.items()}


def reference_loss(folder: Path, batch: Batch) -> float:
    """Mean loss per target token of a checkpoint."""
    model = load_model(folder)
    return sum(_loss(model, batch, start).item() for start in range(0, ROWS, MICRO_ROWS))


def backward(model: Any, batch: Batch, start: int, smoothing: float = 0.0, z: float = 0.0) -> float:
    """Differentiate the micro-batch from row ``start`` on; returns its share of the loss."""
    loss = _loss(model, batch, start, smoothing, z)
    if loss.requires_grad:
        loss.backward()
    return float(loss.item())


def _loss(model: Any, batch: Batch, start: int, smoothing: float = 0.0, z: float = 0.0) -> Tensor:
    """Of one micro-batch; rows without any target are left out, as they have no part in it."""
    rows = slice(start, start + MICRO_ROWS)
    ids, targets = batch.input_ids[rows], batch.targets[rows]
    used = (targets != -100).any(dim=1)
    ids, targets = ids[used], targets[used]
    if not len(ids):
        return torch.zeros(())
    last = (targets != -100).int().cumsum(1).argmax(1, keepdim=True) + 1  # last token that matters
    mask = (torch.arange(SEQ_LEN) <= last).long()
    logits = model(input_ids=ids, attention_mask=mask).logits
    logits, targets = logits.view(-1, logits.shape[-1]), targets.reshape(-1)
    total = torch.nn.functional.cross_entropy(
        logits, targets, ignore_index=-100, reduction="sum", label_smoothing=smoothing
    )
    total = total + z * logits.logsumexp(-1)[targets != -100].square().sum()
    return total / batch.target_tokens


def tolerance(reference: Tensor) -> float:
    """How far a tensor may be from its reference: 1e-5 of its norm, and 1e-6 per element."""
    return 1e-5 * float(reference.norm()) + 1e-6 * float(reference.numel()) ** 0.5


def too_far(ours: Weights, reference: Weights) -> list[str]:
    """Tensors that are out of tolerance, by how much."""
    assert ours.keys() == reference.keys()
    found = []
    for name, value in reference.items():
        error = float((ours[name] - value).norm())
        if not error <= tolerance(value):
            found.append(f"{name}: {error:.2e} > {tolerance(value):.2e}")
    return found


def check_equal(found: Trained, reference: Reference | Trained) -> None:
    """Losses and norms are those of the reference, and no weight is out of tolerance."""
    assert found.losses == pytest.approx(reference.losses, rel=1e-5)
    assert found.norms == pytest.approx(reference.norms, rel=1e-5)
    assert too_far(found.weights, reference.weights) == []


def check_same_bits(first: Trained, *others: Trained) -> None:
    """Losses and all state are the same to the last bit."""
    for other in others:
        assert other.losses == first.losses
        assert different(other.state, first.state) == []


def check_moved(reference: Reference, start: Weights) -> None:
    """The comparison means something: every tensor with a gradient moved far beyond tolerance."""
    for name in reference.with_gradient:
        moved = float((reference.weights[name] - start[name]).norm())
        assert moved >= 100 * tolerance(reference.weights[name]), name


def hf_config(**settings: Any) -> PretrainedConfig:
    """The config of a tiny Llama."""
    return tiny_config("llama", **settings)
