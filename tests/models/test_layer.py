"""The hand-driven decoder layer against transformers' layers under autograd."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModel, PretrainedConfig

from slideformer.graph.model import UnitSpec
from slideformer.graph.plan import Compute, MemoryPlan, kept_nbytes
from slideformer.kernels import triton_support
from slideformer.models import layer
from slideformer.models.attention import window_mask
from slideformer.models.families import DecoderConfig, decoder_config
from slideformer.models.gradients import product_
from slideformer.models.layer_memory import Kept, kept_views
from slideformer.models.rotary import rope_tables
from slideformer.models.units import model_spec
from slideformer.models.workspace import workspace_bytes
from tests.models.tiny import by_stored_name

SMALL: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,  # 6 · 16 ≠ 48
    "num_hidden_layers": 1,
    "vocab_size": 8,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "llama-plain": {},
    "qwen2": {},
    "qwen2-window": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0},
    "qwen3": {},
    "qwen3-bias": {"attention_bias": True},
    "mistral": {"sliding_window": None},
    "mistral-window": {"sliding_window": 7},
    "phi3": {},
    "mixtral": {"num_local_experts": 5},
    "qwen3_moe": {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24},
    "qwen3_moe-normalised": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 40,
        "norm_topk_prob": True,
        "attention_bias": True,
    },
    "gemma2": {"attn_logit_softcapping": 3.0, "layer_types": ["full_attention"]},
    "gemma2-window": {"sliding_window": 5, "attention_bias": True},
    "gemma3_text": {"layer_types": ["full_attention"]},
    "gemma3_text-window": {"sliding_window": 5},
    "phi3-partial": {"partial_rotary_factor": 0.5},
}


def make_config(name: str, **changes: Any) -> PretrainedConfig:
    family = name.split("-")[0]
    config = AutoConfig.for_model(family, **{**SMALL, **FAMILIES[name], **changes})
    assert isinstance(config, PretrainedConfig)
    return config


@dataclass
class Case:
    """A layer of random numbers, as transformers' module and as our flat storage."""

    config: PretrainedConfig
    cfg: DecoderConfig
    unit: UnitSpec
    model: torch.nn.Module
    flat: Tensor

    @classmethod
    def make(cls, config: PretrainedConfig, dtype: torch.dtype, seed: int = 0) -> Case:
        torch.manual_seed(seed)
        config._attn_implementation = "eager"
        config._experts_implementation = "eager"  # takes matrices of any size
        model = AutoModel.from_config(config).train()
        model.norm = torch.nn.Identity()
        unit, cfg = model_spec(config).layers[0], decoder_config(config)
        named = by_stored_name(config, {f"model.{n}": p.data for n, p in model.named_parameters()})
        flat = torch.zeros(unit.numel, dtype=dtype)
        for param in unit.params:
            target = named[param.key]
            assert target.shape == param.shape
            around = 1.0 if "norm" in param.key and not cfg.centred else 0.0
            spread = 0.3 if target.ndim == 1 else target.shape[1] ** -0.5
            value = (around + spread * torch.randn(param.shape)).to(dtype)
            target.copy_(value)
            flat[param.offset : param.offset + param.numel] = value.flatten()
        return cls(config, cfg, unit, model, flat)

    def operands(self, flat: Tensor) -> dict[str, Tensor]:
        return {
            o.name: flat[o.offset : o.offset + o.numel].view(o.shape) for o in self.unit.operands
        }

    def inputs(self, micro: int, batch: int, seq: int) -> tuple[Tensor, Tensor]:
        shape = (micro, batch, seq, self.cfg.hidden)
        x, dy = torch.randn(shape), torch.randn(shape)
        return x.to(self.flat.dtype), dy.to(self.flat.dtype)

    def reference(self, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Output, input gradient and parameter gradients summed over micro-batches, in FP32."""
        x = x.float().detach().requires_grad_()
        outputs = []
        for part, upstream in zip(x, dy.float(), strict=True):
            y = self.model(inputs_embeds=part, use_cache=False).last_hidden_state
            y.backward(upstream)
            outputs.append(y.detach())
        assert x.grad is not None
        named = {
            f"model.{n}": p.grad for n, p in self.model.named_parameters() if p.grad is not None
        }
        stored = by_stored_name(self.config, named)
        grads = {p.key: stored[p.key] for p in self.unit.params}
        return torch.stack(outputs), x.grad, grads

    def ours(
        self, x: Tensor, dy: Tensor, slot_dtype: torch.dtype, device: str = "cpu"
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        x, dx, w = x.to(device), dy.to(device, copy=True), self.operands(self.flat.to(device))
        slot = torch.full((self.unit.numel,), math.nan, dtype=slot_dtype, device=device)
        grads = self.operands(slot)
        seq = x.shape[2]
        rope = rope_tables(self.config, seq, x.device, self.cfg.rope_kinds[0])
        mask = window_mask(seq, self.cfg.windows[0], x.device)
        y = torch.full_like(x, math.nan)
        with torch.no_grad():
            for i in range(len(x)):
                returned = layer.forward(x[i], w, self.cfg, rope, mask=mask, out=y[i])
                assert returned.data_ptr() == y[i].data_ptr()
            kept = x.clone()
            for i in range(len(x)):
                layer.backward(x[i], dx[i], w, grads, self.cfg, rope, accumulate=i > 0, mask=mask)
            assert torch.equal(x, kept)
        by_key = {
            p.key: slot[p.offset : p.offset + p.numel].view(p.shape) for p in self.unit.params
        }
        return y, dx, by_key

    def errors(
        self, micro: int, batch: int, seq: int, slot_dtype: torch.dtype, device: str = "cpu"
    ) -> dict[str, float]:
        """Relative error of every result, by name."""
        x, dy = self.inputs(micro, batch, seq)
        y, dx, grads = self.ours(x, dy, slot_dtype, device)
        ref_y, ref_dx, ref_grads = self.reference(x, dy)
        errors = {"y": relative(y, ref_y), "dx": relative(dx, ref_dx)}
        return errors | {key: relative(grads[key], ref) for key, ref in ref_grads.items()}


def relative(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    difference = found.detach().cpu().double() - expected.double()
    return float(difference.norm() / expected.double().norm())


def assert_small(errors: dict[str, float], limit: float) -> None:
    # `not <=` and not `>`: a NaN must not pass.
    assert not {name: e for name, e in errors.items() if not e <= limit}


def assert_bf16_small(errors: dict[str, float]) -> None:
    # But for the rotation a key bias shifts all scores of a query alike, which changes nothing: its
    # gradient is a sum of terms that nearly cancel, while their roundings do not.
    key_bias = {name: e for name, e in errors.items() if name.endswith("k_proj.bias")}
    assert_small(key_bias, 6e-2)
    assert_small({name: e for name, e in errors.items() if name not in key_bias}, 1.5e-2)


@pytest.mark.parametrize("name", FAMILIES)
def test_fp32_matches_transformers(name: str) -> None:
    case = Case.make(make_config(name), torch.float32)
    assert_small(case.errors(3, 2, 12, torch.float32), 1e-5)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("micro", "slot"), [(1, torch.bfloat16), (3, torch.float32)])
def test_bf16_is_near_transformers_in_fp32(name: str, micro: int, slot: torch.dtype) -> None:
    case = Case.make(make_config(name), torch.bfloat16)
    assert_bf16_small(case.errors(micro, 2, 12, slot))


@settings(max_examples=15)
@given(
    name=st.sampled_from(sorted(FAMILIES)),
    kv_heads=st.integers(1, 3),
    groups=st.integers(1, 3),
    head_dim=st.sampled_from([4, 8, 24]),
    hidden=st.integers(1, 9),
    intermediate=st.integers(1, 50),
    batch=st.integers(1, 3),
    seq=st.integers(1, 17),
    micro=st.integers(1, 2),
    seed=st.integers(0, 1000),
)
def test_fp32_matches_transformers_in_any_shape(
    name: str,
    kv_heads: int,
    groups: int,
    head_dim: int,
    hidden: int,
    intermediate: int,
    batch: int,
    seq: int,
    micro: int,
    seed: int,
) -> None:
    config = make_config(
        name,
        hidden_size=hidden * kv_heads * groups,  # some families want it so
        intermediate_size=intermediate,
        num_attention_heads=kv_heads * groups,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
    )
    case = Case.make(config, torch.float32, seed)
    x, dy = case.inputs(micro, batch, seq)
    y, dx, grads = case.ours(x, dy, torch.float32)
    ref_y, ref_dx, ref_grads = case.reference(x, dy)
    results = {"y": (y, ref_y), "dx": (dx, ref_dx)}
    results |= {key: (grads[key], ref) for key, ref in ref_grads.items()}
    for result, (found, expected) in results.items():
        # Gradients that cancel to almost nothing (one token: those of queries and keys) are
        # compared with the size of what flows in.
        limit = 1e-5 * float(expected.norm()) + 1e-5 * float(dy.norm())
        assert float((found - expected).norm()) <= limit, result


@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh"])
def test_other_activations(activation: str) -> None:
    case = Case.make(make_config("llama", hidden_act=activation), torch.float32)
    assert_small(case.errors(1, 2, 12, torch.float32), 1e-5)


def test_scaled_rotation_uses_its_transpose_in_backward() -> None:
    """YaRN multiplies the rotation by a factor, so that its inverse is not its transpose."""
    yarn = {
        "rope_type": "yarn",
        "factor": 4.0,
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 16,
    }
    case = Case.make(make_config("llama", rope_parameters=yarn), torch.float32)
    assert_small(case.errors(1, 2, 12, torch.float32), 1e-5)


@pytest.mark.parametrize("name", ["qwen3", "phi3-partial", "gemma2", "qwen3_moe"])
def test_interpreted_gpu_kernels_accept_the_layers_strides(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Triton kernels reject some views that the plain ones take."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton compiles its kernels in this process")
    pytest.importorskip("triton")
    monkeypatch.setattr(triton_support, "interpret", True)
    case = Case.make(make_config(name), torch.float32)
    assert_small(case.errors(2, 1, 5, torch.float32), 1e-5)


def test_accumulating_adds_to_what_is_there() -> None:
    case = Case.make(make_config("qwen3-bias"), torch.float32)
    x, dy = case.inputs(1, 2, 6)
    rope = rope_tables(case.config, 6, torch.device("cpu"))
    once, twice = torch.zeros(case.unit.numel), torch.zeros(case.unit.numel)
    with torch.no_grad():
        for slot, times in ((once, 1), (twice, 2)):
            for i in range(times):
                layer.backward(
                    x[0],
                    dy[0].clone(),
                    case.operands(case.flat),
                    case.operands(slot),
                    case.cfg,
                    rope,
                    accumulate=i > 0,
                )
    torch.testing.assert_close(twice, 2 * once, rtol=1e-6, atol=1e-6)


class MatrixFlops(TorchDispatchMode):
    """Counts the floating-point operations of plain matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            left, right = args[-2:]
            self.total += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        return func(*args, **(kwargs or {}))


def test_backward_does_not_recompute_the_down_projection() -> None:
    case = Case.make(make_config("llama"), torch.float32)
    x, dy = case.inputs(1, 2, 12)
    rope = rope_tables(case.config, 12, torch.device("cpu"))
    w, grads = case.operands(case.flat), case.operands(torch.empty(case.unit.numel))
    with torch.no_grad(), MatrixFlops() as flops:
        layer.backward(x[0], dy[0], w, grads, case.cfg, rope, accumulate=False)
    products = 3 * case.unit.matrix_numel - w["down.weight"].numel()
    assert flops.total == 2 * 2 * 12 * products


def run_layer(case: Case, keep: bool, batch: int, seq: int, device: str) -> dict[str, Tensor]:
    """Output and all gradients of one micro-batch."""
    torch.manual_seed(1)
    x, dx = (t[0].to(device) for t in case.inputs(1, batch, seq))
    grads = torch.zeros(case.unit.numel, dtype=x.dtype, device=device)
    w = case.operands(case.flat.to(device))
    rope = rope_tables(case.config, seq, x.device, case.cfg.rope_kinds[0])
    mask = window_mask(seq, case.cfg.windows[0], x.device)
    kept = kept_activations(case, batch, seq, device) if keep else None
    with torch.no_grad():
        y = layer.forward(x, w, case.cfg, rope, mask=mask, kept=kept)
        with MatrixFlops() as flops:
            layer.backward(
                x,
                dx,
                w,
                case.operands(grads),
                case.cfg,
                rope,
                accumulate=False,
                mask=mask,
                kept=kept,
            )
    products = (2 if keep else 3) * case.unit.matrix_numel
    used = {o.name: int(o.share * o.numel) for o in case.unit.operands}
    if case.cfg.output_norms:  # whose inputs are needed
        products += used["o.weight"] + used["down.weight"]
    if not keep:
        products -= used["down.weight"]
    elif case.cfg.experts is not None:  # what the router decides is not kept
        products += used["router.weight"]
    if device == "cpu" or case.cfg.experts is None:  # a GPU's grouped products are no plain ones
        assert flops.total == 2 * batch * seq * products
    return {"y": y, "dx": dx, "gradients": grads}


def kept_activations(case: Case, batch: int, seq: int, device: str) -> Kept:
    """Room for what a layer keeps, full of what would be seen if it were read."""
    plan = MemoryPlan(
        compute=Compute.BF16 if case.flat.dtype is torch.bfloat16 else Compute.FP32,
        rows=batch,
        seq_len=seq,
        micro_rows=batch,
        vocab_chunks=1,
        head_tile=8,
        window=2,
        chunk_numel=1,
        offloaded=0,
        staging_slots=1,
    )
    nbytes = kept_nbytes(model_spec(case.config), plan)
    flat = torch.full((nbytes,), 255, dtype=torch.uint8, device=device)
    return kept_views(flat, case.cfg, batch, seq, case.flat.dtype)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_changes_no_bit(name: str, dtype: torch.dtype) -> None:
    """And backward makes no product again, as `run_layer` counts."""
    case = Case.make(make_config(name), dtype)
    again = run_layer(case, False, 2, 9, "cpu")
    kept = run_layer(case, True, 2, 9, "cpu")
    for key, value in again.items():
        assert torch.equal(kept[key], value), key
        assert value.isfinite().all()


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_an_mlp_in_tiles_is_the_whole_one(name: str, accumulate: bool, keep: bool) -> None:
    """But for the order in which gradients are added up."""
    case = Case.make(make_config(name), torch.float32)
    x, dy = case.inputs(1, 1, 23)
    rope, w = rope_tables(case.config, 23, torch.device("cpu")), case.operands(case.flat)
    found = []
    for tile in (None, 10):
        kept = kept_activations(case, 1, 23, "cpu") if keep else None
        grads, dx = torch.ones(case.unit.numel), dy[0].clone()
        with torch.no_grad():
            y = layer.forward(x[0], w, case.cfg, rope, kept=kept, tile=tile)
            layer.backward(
                x[0],
                dx,
                w,
                case.operands(grads),
                case.cfg,
                rope,
                accumulate=accumulate,
                kept=kept,
                tile=tile,
            )
        found.append((y, dx, grads))
    for whole, tiled in zip(*found, strict=True):
        torch.testing.assert_close(tiled, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "dtype", "keeps"),
    [
        ("llama", torch.bfloat16, True),
        ("llama", torch.float32, False),
        ("mistral-window", torch.bfloat16, False),
    ],
)
def test_attention_is_kept_where_it_can_go_on(name: str, dtype: torch.dtype, keeps: bool) -> None:
    case = Case.make(make_config(name), dtype)
    assert (kept_activations(case, 2, 9, "cpu").attention is not None) is keeps


def test_windows_are_those_of_transformers() -> None:
    """Query i sees the keys i − window < j ≤ i."""
    mask = window_mask(5, 2, torch.device("cpu"))
    assert mask is not None
    expected = [[i - 2 < j <= i for j in range(5)] for i in range(5)]
    assert mask.tolist() == expected
    assert window_mask(5, 5, torch.device("cpu")) is None
    assert window_mask(5, None, torch.device("cpu")) is None


@pytest.mark.parametrize("accumulate", [False, True])
def test_products_of_bf16_are_summed_in_fp32(accumulate: bool) -> None:
    left = torch.randn(7, 300).bfloat16()
    right = torch.randn(300, 5).bfloat16()
    start = torch.randn(7, 5)
    out = start.clone()
    product_(out, left, right, accumulate=accumulate)
    exact = left.double() @ right.double() + (start.double() if accumulate else 0)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-4)


def test_partial_sums_in_bf16_are_refused() -> None:
    bf16 = torch.ones(2, 2, dtype=torch.bfloat16)
    with pytest.raises(AssertionError, match="FP32"):
        product_(bf16.clone(), bf16, bf16, accumulate=True)


# -- on a GPU ----------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("micro", "slot"), [(1, torch.bfloat16), (3, torch.float32)])
def test_gpu_bf16_is_near_transformers_in_fp32(name: str, micro: int, slot: torch.dtype) -> None:
    case = Case.make(make_config(name), torch.bfloat16)
    assert_bf16_small(case.errors(micro, 2, 12, slot, "cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", FAMILIES)
def test_gpu_fp32_matches_transformers(name: str) -> None:
    case = Case.make(make_config(name), torch.float32)
    assert_small(case.errors(2, 2, 12, torch.float32, "cuda"), 1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_kept_activations_change_no_bit(name: str, dtype: torch.dtype) -> None:
    case = Case.make(make_config(name), dtype)
    torch.use_deterministic_algorithms(True)
    try:
        again, kept = (run_layer(case, keep, 2, 64, "cuda") for keep in (False, True))
    finally:
        torch.use_deterministic_algorithms(False)
    for key, value in again.items():
        assert torch.equal(kept[key], value), key


@pytest.mark.gpu
@pytest.mark.parametrize("accumulate", [False, True])
def test_gpu_products_of_bf16_are_summed_in_fp32(accumulate: bool) -> None:
    left = torch.randn(256, 4096, device="cuda").bfloat16()
    right = torch.randn(4096, 128, device="cuda").bfloat16()
    start = torch.randn(256, 128, device="cuda")
    out = start.clone()
    product_(out, left, right, accumulate=accumulate)
    exact = left.double() @ right.double() + (start.double() if accumulate else 0)
    torch.testing.assert_close(out.double(), exact, rtol=1e-4, atol=1e-3)


LARGE: dict[str, dict[str, Any]] = {  # the decoder layers of well-known models
    "llama-plain": {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "qwen3": {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "qwen3_moe": {
        "hidden_size": 2048,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
    },
    "gemma2": {
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
    },
}


@pytest.fixture
def large_layer(request: pytest.FixtureRequest) -> Iterator[tuple[Any, ...]]:
    """Arguments of forward and of backward for a layer of realistic size, warmed up once."""
    name, batch, seq = request.param
    config = make_config(name, **LARGE[name])
    cfg, unit = decoder_config(config), model_spec(config).layers[0]
    bf16: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda"}
    flat = torch.randn(unit.numel, **bf16).mul_(0.02)
    slot = torch.empty(unit.numel, **bf16)
    w, grads = (
        {o.name: f[o.offset : o.offset + o.numel].view(o.shape) for o in unit.operands}
        for f in (flat, slot)
    )
    x = torch.randn(batch, seq, cfg.hidden, **bf16)
    out, dy = torch.empty_like(x), torch.randn_like(x)
    rope = rope_tables(config, seq, x.device)
    with torch.no_grad():
        layer.forward(x, w, cfg, rope, out=out)
        layer.backward(x, dy, w, grads, cfg, rope, accumulate=False)
        torch.cuda.synchronize()
        yield x, out, dy, w, grads, cfg, rope


SIZES = [
    ("llama-plain", 16, 1024),
    ("llama-plain", 1, 8192),
    ("qwen3", 8, 1024),
    ("qwen3_moe", 8, 1024),
    ("gemma2", 8, 1024),
]


@pytest.mark.gpu
@pytest.mark.parametrize("large_layer", SIZES, indirect=True)
def test_gpu_peak_is_within_the_formula(large_layer: tuple[Any, ...]) -> None:
    x, out, dy, w, grads, cfg, rope = large_layer
    peaks = {}
    for pass_name in ("forward", "backward"):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        if pass_name == "forward":
            layer.forward(x, w, cfg, rope, out=out)
        else:
            layer.backward(x, dy, w, grads, cfg, rope, accumulate=False)
        torch.cuda.synchronize()
        peaks[pass_name] = torch.cuda.max_memory_allocated() - before
    limit = workspace_bytes(cfg, x.shape[0] * x.shape[1], 2, x.shape[1])
    assert max(peaks.values()) <= limit, peaks
    assert max(peaks.values()) >= 0.6 * limit, peaks


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("large_layer", [SIZES[0], *SIZES[3:]], indirect=True)
def test_gpu_host_never_waits(large_layer: tuple[Any, ...]) -> None:
    x, out, dy, w, grads, cfg, rope = large_layer
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer.forward(x, w, cfg, rope, out=out)
        layer.backward(x, dy, w, grads, cfg, rope, accumulate=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
