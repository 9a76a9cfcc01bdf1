"""Speed of the Triton kernels on this machine's GPU: ``python -m slideformer.kernels.bench``.

For each kernel and shape, and for ours, the eager reference, the reference under ``torch.compile``
and Liger-Kernel where it is installed: median time, useful bandwidth (every input read once, every
output written once), its share of what a plain copy reaches, and the host's time for one call.
Correctness is the tests' business.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from slideformer.kernels import reference
from slideformer.kernels.adamw import AdamW, Segment
from slideformer.kernels.adamw8_gpu import adamw8_update_gpu
from slideformer.kernels.adamw_gpu import adamw_rows_gpu, adamw_update_gpu
from slideformer.kernels.cross_entropy import PLAIN, lse_accumulate, lse_init, softmax_grad_
from slideformer.kernels.quantise import block_count
from slideformer.kernels.rms_norm import rms_norm, rms_norm_backward
from slideformer.kernels.rope import rope_
from slideformer.kernels.swiglu import swiglu, swiglu_backward

Run = Callable[[], object]

EPS = 1e-5
HEADS, KEY_HEADS, HEAD_SIZE = 32, 8, 128
VOCABULARY = 128_256


@dataclass(frozen=True)
class Case:
    """One kernel on one shape: the bytes it must move, and how each implementation is called."""

    name: str
    shape: str
    bytes_moved: int
    ours: Run
    plain: Callable[..., object]
    plain_arguments: tuple[object, ...]
    liger: Callable[[], Run] | None = None


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def liger(module: str, name: str) -> Any:
    """A Liger-Kernel autograd function; ``ImportError`` where Liger is not installed."""
    return getattr(importlib.import_module(f"liger_kernel.ops.{module}"), name)


def norm_cases(tokens: int, n: int) -> Iterator[Case]:
    x, dy, residual, weight = normal(tokens, n), normal(tokens, n), normal(tokens, n), normal(n)
    _, rstd = rms_norm(x, weight, EPS)
    one = x.nbytes
    shape = f"{tokens} x {n}"

    def liger_forward() -> Run:
        function = liger("rms_norm", "LigerRMSNormFunction")
        return lambda: function.apply(x, weight, EPS, 0.0, "llama", False)

    def liger_backward() -> Run:
        function = liger("rms_norm", "LigerRMSNormFunction")
        inputs = x.detach().requires_grad_(), weight.detach().requires_grad_()
        y = function.apply(*inputs, EPS, 0.0, "llama", False)
        return lambda: torch.autograd.grad(y, inputs, dy, retain_graph=True)

    yield Case(
        "rms_norm",
        shape,
        2 * one,
        lambda: rms_norm(x, weight, EPS),
        reference.rms_norm,
        (x, weight, EPS, None, False),
        liger_forward,
    )
    yield Case(
        "rms_norm_backward",
        shape,
        3 * one,
        lambda: rms_norm_backward(dy, x, weight, rstd),
        reference.rms_norm_backward,
        (dy, x, weight, rstd, None, None, False),
        liger_backward,
    )
    yield Case(
        "rms_norm_backward + bypass",
        shape,
        4 * one,
        lambda: rms_norm_backward(dy, x, weight, rstd, residual),
        reference.rms_norm_backward,
        (dy, x, weight, rstd, residual, None, False),
    )


def head_cases(tokens: int) -> Iterator[Case]:
    """Per-head norm and rotation on views of a fused projection, in place."""
    rotated = HEADS + KEY_HEADS
    fused = normal(tokens, (HEADS + 2 * KEY_HEADS) * HEAD_SIZE)
    dfused = torch.randn_like(fused)
    weight = normal(HEAD_SIZE)
    queries, dqueries = (
        t[:, : HEADS * HEAD_SIZE].unflatten(-1, (HEADS, HEAD_SIZE)) for t in (fused, dfused)
    )
    _, rstd = rms_norm(queries, weight, EPS)
    one = tokens * HEADS * HEAD_SIZE * 2
    shape = f"{tokens} x {HEADS} x {HEAD_SIZE} view"
    yield Case(
        "rms_norm",
        shape,
        2 * one,
        lambda: rms_norm(queries, weight, EPS, out=queries),
        reference.rms_norm,
        (queries, weight, EPS, queries, False),
    )
    yield Case(
        "rms_norm_backward",
        shape,
        3 * one,
        lambda: rms_norm_backward(dqueries, queries, weight, rstd, out=dqueries),
        reference.rms_norm_backward,
        (dqueries, queries, weight, rstd, None, dqueries, False),
    )

    heads = fused[:, : rotated * HEAD_SIZE].view(1, tokens, rotated, HEAD_SIZE)
    angles = torch.rand(tokens, HEAD_SIZE // 2, device="cuda").repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()

    def liger_rope() -> Run:
        function = liger("rope", "LigerRopeFunction")
        q, k = (h.transpose(1, 2) for h in heads.split((HEADS, KEY_HEADS), 2))
        return lambda: function.apply(q, k, cos[None], sin[None])

    yield Case(
        "rope_",
        f"{tokens} x {rotated} x {HEAD_SIZE} view",
        2 * tokens * rotated * HEAD_SIZE * 2,
        lambda: rope_(heads, cos, sin),
        reference.rope_,
        (heads, cos, sin, False),
        liger_rope,
    )


def swiglu_cases(tokens: int, width: int) -> Iterator[Case]:
    gate_up, dact = normal(tokens, 2 * width), normal(tokens, width)
    one = dact.nbytes
    shape = f"{tokens} x {width}"

    def halves() -> tuple[Tensor, Tensor]:
        gate, up = gate_up.clone().chunk(2, -1)
        return gate.contiguous().requires_grad_(), up.contiguous().requires_grad_()

    def liger_forward() -> Run:
        function = liger("swiglu", "LigerSiLUMulFunction")
        gate, up = halves()
        return lambda: function.apply(gate, up)

    def liger_backward() -> Run:
        # Ours gives the activation again, too: the gradient of the next weight needs it.
        function = liger("swiglu", "LigerSiLUMulFunction")
        inputs = halves()
        return lambda: torch.autograd.grad(function.apply(*inputs), inputs, dact)

    yield Case(
        "swiglu",
        shape,
        3 * one,
        lambda: swiglu(gate_up),
        reference.swiglu,
        (gate_up, "silu"),
        liger_forward,
    )
    yield Case(
        "swiglu_backward",
        shape,
        6 * one,
        lambda: swiglu_backward(dact, gate_up),
        reference.swiglu_backward,
        (dact, gate_up, "silu", None),
        liger_backward,
    )


def cross_entropy_cases(tokens: int) -> Iterator[Case]:
    logits = normal(tokens, VOCABULARY)
    targets = torch.randint(VOCABULARY, (tokens,), device="cuda")
    state = lse_init(tokens, "cuda")
    lse = logits.float().logsumexp(-1)
    one = logits.nbytes
    shape = f"{tokens} x {VOCABULARY}"

    def both() -> None:
        lse_accumulate(logits, targets, 0, *state)
        softmax_grad_(logits, targets, 0, lse, 1.0)

    def plain_both() -> None:
        reference.lse_accumulate(logits, targets, 0, *state, PLAIN)
        reference.softmax_grad_(logits, targets, 0, lse, 1.0, PLAIN)

    def liger_both() -> Run:
        function = liger("cross_entropy", "LigerCrossEntropyFunction")
        inputs = logits.clone().requires_grad_()
        return lambda: function.apply(inputs, targets, None)

    yield Case(
        "lse_accumulate",
        shape,
        one,
        lambda: lse_accumulate(logits, targets, 0, *state),
        reference.lse_accumulate,
        (logits, targets, 0, *state, PLAIN),
    )
    yield Case(
        "softmax_grad_",
        shape,
        2 * one,
        lambda: softmax_grad_(logits, targets, 0, lse, 1.0),
        reference.softmax_grad_,
        (logits, targets, 0, lse, 1.0, PLAIN),
    )
    yield Case("both sweeps", shape, 3 * one, both, plain_both, (), liger_both)


def adamw_cases(n: int, hidden: int) -> Iterator[Case]:
    """Dense, with 8-bit moments too, and idle rows. Eager is the fused AdamW on FP32, 28 bytes."""
    rates = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
    hyper = AdamW(**rates, step=100)
    w, m, grad = torch.randn(3, n, device="cuda")
    step, norm = torch.ones(2, device="cuda")
    fused = partial(torch._fused_adamw_, **rates, amsgrad=False, maximize=False)
    lists: tuple[object, ...] = ([w], [grad], [m], [m.square()], [], [step])
    state = (normal(n).view(torch.int16), torch.zeros_like(w, dtype=torch.int16), m, m.square())
    whole = [Segment(0, n, hyper.lr, hyper.weight_decay)]
    dense = partial(adamw_update_gpu, *state, normal(n), norm, whole, hyper)
    yield Case("adamw_update_gpu", f"{n}", 26 * n, dense, fused, lists)
    codes = torch.randint(0, 256, (2, n), device="cuda", dtype=torch.uint8)
    eight = (*state[:2], codes[0], codes[1], torch.full((2 * block_count(n),), 1e-3, device="cuda"))
    dense = partial(adamw8_update_gpu, *eight, normal(n), norm, whole, hyper)
    yield Case("adamw8_update_gpu", f"{n}", 14 * n, dense, fused, lists)
    index = torch.arange(n // hidden + 1, device="cuda")
    table = (index[-1:], index[:-1], index * 0, index[:0], normal(0, hidden))
    squares = m.new_empty(n // hidden)
    # Moments of 0: rows of tokens that no batch has held yet.
    fresh = (*state[:2], torch.zeros_like(m), torch.zeros_like(m))
    idle = partial(adamw_rows_gpu, *fresh, *table, None, squares, hyper)
    yield Case("adamw_rows_gpu idle", f"{n // hidden} x {hidden}", 24 * n, idle, fused, lists)


def cases(tokens: int) -> Iterator[Case]:
    """All of them, one group's tensors at a time."""
    for n in (3072, 4096, 8192, 16384):
        yield from norm_cases(tokens, n)
    yield from head_cases(tokens)
    for width in (8192, 14336, 53248):
        yield from swiglu_cases(tokens // 4 if width > 20_000 else tokens, width)
    yield from cross_entropy_cases(max(1, tokens // 4))
    yield from adamw_cases(2**25, 2048)
    yield from adamw_cases(2**28, 16384)


def milliseconds(run: Run) -> float:
    """Median time on the GPU, with a cold L2 cache."""
    from triton.testing import do_bench

    return float(do_bench(run, return_mode="median"))


def host_microseconds(run: Run) -> float:
    """Time until one call returns, while the GPU's queue is not full."""
    calls = 20
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    elapsed = time.perf_counter() - start
    torch.cuda.synchronize()
    return elapsed / calls * 1e6


def copy_bandwidth() -> float:
    """Bytes read and written per second by a copy of 1 GiB within the GPU's memory."""
    source = torch.zeros(2**29, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / milliseconds(lambda: target.copy_(source)) * 1e3


def report(case: Case, copy: float) -> Iterator[str]:
    """One line for each implementation; one that cannot run says why and the rest goes on."""
    torch.compiler.reset()
    compiled = torch.compile(case.plain, dynamic=False)
    makers: dict[str, Callable[[], Run]] = {
        "ours": lambda: case.ours,
        "eager": lambda: lambda: case.plain(*case.plain_arguments),
        "compile": lambda: lambda: compiled(*case.plain_arguments),
    }
    if case.liger is not None:
        makers["liger"] = case.liger
    for name, make in makers.items():
        head = f"{case.name:27}{case.shape:24}{name:9}"
        try:
            run = make()
            ms, host = milliseconds(run), host_microseconds(run)
        except ImportError:
            continue
        except Exception as error:  # a competitor's failure is a result
            yield f"{head}failed: {' '.join(str(error).split())[:120] or repr(error)}"
            continue
        rate = case.bytes_moved / ms * 1e3
        yield f"{head}{ms:9.3f}{rate / 1e9:9.0f}{rate / copy:8.2f}{host:9.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, default=16384, help="rows of the layer kernels")
    parser.add_argument("--only", default="", help="only kernels whose name contains this")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench: no CUDA device; the kernels are measured on one")
    copy = copy_bandwidth()
    write = sys.stdout.write
    write(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, ")
    write(f"copy {copy / 1e9:.0f} GB/s\n")
    write(f"{'kernel':27}{'shape':24}{'':9}{'ms':>9}{'GB/s':>9}{'share':>8}{'host µs':>9}\n")
    for case in cases(options.tokens):
        if options.only in case.name:
            for line in report(case, copy):
                write(line + "\n")
                sys.stdout.flush()


if __name__ == "__main__":
    main()
