"""How fast a device does matrix products: layers, attention and output matrix of made-up shapes.

A layer's time is that of attention, measured apart, and of its other products with all that is done
around them. Rates are FLOPs as ``graph/products.py`` counts them over seconds, so that a prediction
by the same counts gives the measured time back.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from transformers import AutoConfig, PretrainedConfig

from slideformer.graph.products import (
    ATTENTION_BACKWARD,
    backward_products,
    forward_products,
    head_products,
)
from slideformer.graph.rates import ProductRates, RatePoint
from slideformer.graph.tasks import Product, ProductKind
from slideformer.measuring.stand_in import Arithmetic, StandIn, plan_of
from slideformer.measuring.update_rates import seconds_of
from slideformer.models.attention import RecordedAttention, Scores, attention
from slideformer.models.units import model_spec

HEAD_DIM = 128
_SHARING = 4
"""Query heads that share keys and values."""

_SEQ_LEN = 1024
_FEW_VOCAB = 256
"""Rows of the output matrix where only the layer counts."""

_PARTS = 3
"""Parts that repetitions are measured in; the median counts."""


@dataclass(frozen=True, slots=True)
class ProductSizes:
    """What to measure: layer widths by numbers of tokens, attention's rows, the output matrix.

    For each width the tokens grow until one pass takes ``longest`` seconds or memory is out. What
    is shorter than ``seconds`` is repeated for so long to warm up, and again to be measured.
    """

    widths: Sequence[int]
    tokens: Sequence[int]
    sequences: Sequence[int]
    vocab: int
    tiles: Sequence[int]
    longest: float
    seconds: float


def measure_products(
    device: torch.device, sizes: ProductSizes, done: Callable[[str], None]
) -> tuple[RatePoint, ...]:
    """Rates of products in BF16 on ``device``; ``done`` is called with what was measured last."""
    points: list[RatePoint] = []
    with torch.no_grad():
        for seq_len in sizes.sequences:
            points += _growing(
                device, partial(_attention, device, sizes.seconds), [seq_len], sizes.longest
            )
            done(f"attention, rows of {seq_len} tokens")
        for width in sizes.widths:
            rates = ProductRates(1.0, tuple(points))
            layer = partial(_layer, device, sizes.seconds, rates, width)
            points += _growing(device, layer, sizes.tokens, sizes.longest)
            done(f"layers of width {width}")
        for width in sizes.widths[:2]:
            points += _growing(
                device,
                partial(_head, device, sizes.seconds, width, sizes.vocab),
                sizes.tiles,
                sizes.longest,
            )
            done(f"output matrix of width {width}")
    return tuple(points)


def layer_config(width: int, vocab: int = _FEW_VOCAB) -> PretrainedConfig:
    """A Llama layer of that hidden size, 3.5 times as wide inside, as many larger models are."""
    heads = max(1, width // HEAD_DIM)
    return AutoConfig.for_model(
        "llama",
        hidden_size=width,
        intermediate_size=-(-7 * width // 2 // 256) * 256,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // _SHARING),
        head_dim=HEAD_DIM,
        vocab_size=vocab,
        max_position_embeddings=1 << 20,
        tie_word_embeddings=False,
    )


Measured = tuple[list[RatePoint], float]
"""Points, and the seconds of one pass."""


def _growing(
    device: torch.device,
    measured: Callable[[int], Measured],
    tokens: Sequence[int],
    longest: float,
) -> Iterator[RatePoint]:
    """Points for more and more tokens, while a pass is short enough and fits."""
    for count in tokens:
        try:
            points, seconds = measured(count)
        except torch.OutOfMemoryError:
            return
        finally:
            if device.type == "cuda":
                torch.cuda.empty_cache()
        yield from points
        if seconds > longest:
            return


def _attention(device: torch.device, seconds: float, seq_len: int) -> Measured:
    """Forward, and forward with backward, over 16k tokens or one row."""
    rows, heads = max(1, (1 << 14) // seq_len), 32
    if device.type == "cpu":
        rows, heads = 1, 4
    shape = (rows, seq_len, heads, HEAD_DIM)
    q, dout = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in "qd")
    k, v = (
        torch.randn(*shape[:2], heads // _SHARING, HEAD_DIM, device=device, dtype=torch.bfloat16)
        for _ in "kv"
    )
    scores = Scores(HEAD_DIM**-0.5)

    def backward() -> None:
        RecordedAttention(q, k, v, scores).backward(dout)

    took = _repeated(lambda: attention(q, k, v, scores), device, seconds)
    took += _repeated(backward, device, seconds)
    flops = (2 + ATTENTION_BACKWARD) * 2 * seq_len * seq_len * heads * HEAD_DIM * rows
    return [RatePoint(ProductKind.ATTENTION, HEAD_DIM, seq_len, flops / took)], took


def _layer(
    device: torch.device, seconds: float, known: ProductRates, width: int, tokens: int
) -> Measured:
    """Forward, backward with gradients in the compute dtype, and backward with sums in FP32."""
    config, seq_len = layer_config(width), min(tokens, _SEQ_LEN)
    spec, rows = model_spec(config), tokens // seq_len
    forward = forward_products(spec, spec.layers[0], rows, seq_len)
    points: list[RatePoint] = []
    longest = 0.0
    for micro_batches in (1, 2):
        sizes = Arithmetic(rows * micro_batches, seq_len, rows, tokens, "bf16")
        stand_in = StandIn(config, sizes, device)
        if not points:
            took = _repeated(stand_in.forward, device, seconds)
            points.append(_rest(known, forward, ProductKind.FORWARD, took))
        rates = ProductRates(known.sustained, (*known.points, *points))
        took = _repeated(stand_in.backward, device, seconds)
        products = backward_products(spec, spec.layers[0], plan_of(sizes), kept=False)
        points.append(_rest(rates, products, products[1].kind, took))
        longest = max(longest, took)
        del stand_in
    return points, longest


def _rest(
    rates: ProductRates, products: Sequence[Product], kind: ProductKind, seconds: float
) -> RatePoint:
    """The rate of the products of one kind, given what all took and the other kinds' rates.

    At least half of what their share of FLOPs would have: short measurements scatter.
    """
    [own] = [product for product in products if product.kind is kind]
    others = rates.seconds(product for product in products if product.kind is not kind)
    share = own.flops / sum(product.flops for product in products)
    return RatePoint(
        kind, own.width, own.tokens, own.flops / max(seconds - others, seconds * share / 2)
    )


def _head(device: torch.device, seconds: float, width: int, vocab: int, tile: int) -> Measured:
    """Loss and gradients of two tiles, so that the matrix's gradient is a sum."""
    config = layer_config(width, vocab)
    sizes = Arithmetic(2, tile, 2, tile, "bf16")
    took = _repeated(StandIn(config, sizes, device).head, device, seconds)
    [product] = head_products(model_spec(config), plan_of(sizes), vocab, products=3)
    return [RatePoint(ProductKind.HEAD, width, tile, product.flops / took)], took


def _repeated(run: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Seconds of one call, at the clock that the device keeps up: after ``seconds`` of the same."""

    def call(times: int) -> None:
        for _ in range(times):
            run()

    call(1)  # compiles
    once = max(seconds_of(partial(call, 1), device), 1e-9)
    call(round(seconds / once))
    times = max(1, round(seconds / once / _PARTS))
    parts = _PARTS if times > 1 else 1
    return statistics.median(seconds_of(partial(call, times), device) / times for _ in range(parts))
