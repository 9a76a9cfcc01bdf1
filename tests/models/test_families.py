"""Units, names and arithmetic of every family agree with transformers; the rest is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from slideformer.graph.errors import CheckpointError, ConfigError, UnsupportedModelError
from slideformer.graph.model import ALIGNMENT, UnitKind
from slideformer.models.families import (
    FAMILIES,
    ROPE_TYPES,
    Family,
    decoder_config,
    read_model_config,
)
from slideformer.models.rotary import rope_tables
from slideformer.models.shapes import SHAPE_NAMES, shape_config
from slideformer.models.units import model_spec
from tests.models.tiny import VARIANTS, by_stored_name, tiny_config, tiny_model


def test_every_family_has_a_variant() -> None:
    assert {settings["model_type"] for settings in VARIANTS.values()} == set(FAMILIES)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_are_those_of_transformers(variant: str, tied: bool) -> None:
    config = tiny_config(variant, tied=tied)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    spec = model_spec(config)
    ours = {param.key: param.shape for unit in spec.units for param in unit.params}
    stored = by_stored_name(config, dict(model.named_parameters()))
    assert ours == {name: tuple(p.shape) for name, p in stored.items()}
    assert spec.param_count == model.num_parameters()
    assert spec.tied is tied


@pytest.mark.parametrize("variant", VARIANTS)
def test_operands_are_their_parameters_stacked(variant: str) -> None:
    spec = model_spec(tiny_config(variant))
    for unit in spec.units:
        end = 0
        for operand in unit.operands:
            assert operand.offset % ALIGNMENT == 0
            assert operand.offset >= end
            end = operand.offset + operand.numel
            inside = [p for p in unit.params if operand.offset <= p.offset < end]
            assert sum(p.numel for p in inside) == operand.numel
            assert all(p.shape[1:] == operand.shape[1:] for p in inside)
        assert sum(o.numel for o in unit.operands) == unit.param_count
        assert unit.numel >= end


def test_units_and_operands_have_their_fixed_names() -> None:
    spec = model_spec(tiny_config("qwen3-biases"))
    assert [unit.name for unit in spec.units] == ["embed", "L00", "L01", "L02", "norm", "head"]
    assert [unit.kind for unit in spec.units] == [
        UnitKind.EMBED,
        *[UnitKind.LAYER] * 3,
        UnitKind.NORM,
        UnitKind.HEAD,
    ]
    operands = {o.name: o.shape for o in spec.unit("L01").operands}
    assert operands == {
        "qkv.weight": (4 * 24 + 2 * 2 * 24, 64),
        "o.weight": (64, 4 * 24),
        "gate_up.weight": (2 * 96, 64),
        "down.weight": (64, 96),
        "qkv.bias": (4 * 24 + 2 * 2 * 24,),
        "o.bias": (64,),
        "input_norm.weight": (64,),
        "post_norm.weight": (64,),
        "q_norm.weight": (24,),
        "k_norm.weight": (24,),
    }
    stacked = [p.key for p in spec.unit("L01").params[:3]]
    assert stacked == [f"model.layers.1.self_attn.{p}_proj.weight" for p in "qkv"]
    biases = {o.name for o in model_spec(tiny_config("llama-biases")).layers[0].operands}
    assert {"qkv.bias", "o.bias", "gate_up.bias", "down.bias"} <= biases


def test_layer_names_sort_beyond_a_hundred_layers() -> None:
    names = [unit.name for unit in model_spec(tiny_config(num_hidden_layers=101)).layers]
    assert (names[0], names[-1]) == ("L000", "L100")
    assert names == sorted(names)


@pytest.mark.parametrize(
    ("variant", "settings"),
    [
        ("llama", {}),
        ("llama", {"sliding_window": 4}),
        ("mistral", {"sliding_window": 4}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {"sliding_window": 4}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
        (
            "qwen3",
            {
                "use_sliding_window": True,
                "sliding_window": 1,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
        ),
        ("gemma2", {}),
        ("gemma3_text", {}),
    ],
)
def test_windows_mask_what_transformers_masks(variant: str, settings: dict[str, Any]) -> None:
    config = tiny_config(variant, **settings)
    model = tiny_model(config)
    model.set_attn_implementation("eager")
    length = 11
    tokens = torch.arange(length)[None]
    with torch.no_grad():
        attentions = model(tokens, output_attentions=True).attentions
    query, key = torch.arange(length)[:, None], torch.arange(length)[None, :]
    windows = decoder_config(config).windows
    assert len(windows) == len(attentions)
    for window, probabilities in zip(windows, attentions, strict=True):
        visible = key <= query
        if window is not None:
            visible &= key > query - window
        assert torch.equal(probabilities[0, 0] > 0, visible)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("pad", [None, 7, -1])
def test_arithmetic_settings_are_those_of_the_modules(variant: str, pad: int | None) -> None:
    config = tiny_config(variant, rms_norm_eps=3e-5, pad_token_id=pad)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config).model
    decoder = decoder_config(config)
    attention, mlp = model.layers[0].self_attn, model.layers[0].mlp
    keys, up = ("qkv_proj", "gate_up_proj") if decoder.fused else ("k_proj", "up_proj")
    assert decoder.scale == attention.scaling
    assert decoder.head_dim == attention.head_dim
    assert decoder.qkv_bias is (getattr(attention, keys).bias is not None)
    assert decoder.o_bias is (attention.o_proj.bias is not None)
    if decoder.experts is None:
        assert decoder.mlp_bias is (getattr(mlp, up).bias is not None)
    else:
        experts = decoder.experts
        assert (experts.count, experts.chosen) == (mlp.experts.num_experts, mlp.gate.top_k)
        assert experts.width == mlp.experts.intermediate_dim
    assert decoder.qk_norm is hasattr(attention, "q_norm")
    assert decoder.norm_eps == getattr(model.norm, "variance_epsilon", None) or model.norm.eps
    assert decoder.centred is bool((tiny_model(config).model.norm.weight < 0.5).any())
    assert decoder.softcap == getattr(attention, "attn_logit_softcapping", None)
    assert decoder.final_softcap == getattr(config, "final_logit_softcapping", None)
    scale = getattr(model.embed_tokens, "scalar_embed_scale", None)
    assert decoder.embed_scale == scale
    assert decoder.padding_idx == model.embed_tokens.padding_idx


@pytest.mark.parametrize(
    ("variant", "settings", "named"),
    [
        ("llama", {"hidden_act": "relu"}, "hidden_act 'relu'"),
        ("llama", {"attention_dropout": 0.1}, "attention_dropout 0.1"),
        ("llama", {"pretraining_tp": 2}, "pretraining_tp 2"),
        ("llama", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ("llama", {"is_causal": False}, "is_causal False"),
        ("llama", {"pad_token_id": 301}, "pad_token_id 301"),
        ("llama", {"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ("mixtral", {"hidden_size": 36}, "head_dim 9"),
        ("llama", {"rope_parameters": {"rope_type": "proportional"}}, "rope_type 'proportional'"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
        ("gemma3_text", {"hidden_activation": "relu"}, "hidden_activation 'relu'"),
        ("mixtral", {"num_experts_per_tok": 6}, "num_experts_per_tok 6"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise 0.1"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, r"mlp_only_layers \[1\]"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step 2"),
        ("phi3", {"partial_rotary_factor": 0.6}, "partial_rotary_factor 0.6"),
        ("phi3", {"resid_pdrop": 0.1}, "resid_pdrop 0.1"),
        ("mistral", {"sliding_window": 0}, "sliding_window 0"),
        ("qwen2", {"layer_types": ["chunked_attention"] * 3}, r"layer_types\[0\]"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 3}, "use_sliding_window"),
    ],
)
def test_settings_without_an_implementation_are_refused(
    variant: str, settings: dict[str, Any], named: str
) -> None:
    rope = settings.get("rope_parameters")
    if rope:
        rope["rope_theta"] = 1e4
    config = tiny_config(variant, **settings)
    with pytest.raises(UnsupportedModelError, match=named):
        decoder_config(config)
    with pytest.raises(UnsupportedModelError, match=named):
        model_spec(config)


def test_an_unknown_family_is_refused_by_name(tmp_path: Path) -> None:
    for content in ({"model_type": "gemma3n"}, {"model_type": ["llama"]}, {}):
        (tmp_path / "config.json").write_text(json.dumps(content))
        with pytest.raises(UnsupportedModelError, match=r"supported are .*llama.*qwen3") as caught:
            read_model_config(tmp_path)
        assert repr(content.get("model_type")) in str(caught.value)


def test_a_config_is_read_back(tmp_path: Path) -> None:
    config = tiny_config("qwen3", tied=True)
    config.save_pretrained(tmp_path)
    read = read_model_config(tmp_path)
    assert model_spec(read) == model_spec(config)
    assert decoder_config(read) == decoder_config(config)


def test_code_of_the_folder_is_not_run(tmp_path: Path) -> None:
    config = tiny_config().to_dict() | {"auto_map": {"AutoConfig": "evil.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\n")
    assert read_model_config(tmp_path).model_type == "llama"
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no config.json"),
        ("{", "cannot read"),
        ("[" * 100_000, "cannot read"),
        (
            '{"model_type": "llama", "num_key_value_heads": 0}',
            "num_key_value_heads is 0; it must be",
        ),
        ('{"model_type": "qwen2", "num_hidden_layers": 1000000000}', "between 1 and 10000"),
        ('{"model_type": "llama", "hidden_size": -72}', "hidden_size is -72; it must be between 1"),
        ("[]", "not an object"),
        ("\xff", "cannot read"),
        ('{"model_type": "llama", "hidden_size": "many"}', "not a valid model config.*hidden_size"),
        ('{"model_type": "llama", "hidden_size": 65}', "not a valid model config.*65"),
    ],
)
def test_a_broken_config_is_named(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError, match=message) as caught:
        read_model_config(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        read_model_config(tmp_path / "absent")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="not a folder"):
        read_model_config(tmp_path / "file")


ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 3.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "longrope": {
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
        "long_factor": [1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0],
        "original_max_position_embeddings": 24,
    },
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}


ROPED = [
    (f, r) for f in FAMILIES for r in ROPE_TYPES if f != "phi3" or r in ("default", "longrope")
]


@pytest.mark.parametrize(("family", "rope_type"), ROPED)
@pytest.mark.parametrize("seq_len", [17, 96])
def test_rope_tables_are_those_of_the_model(family: str, rope_type: str, seq_len: int) -> None:
    config = _roped(rope_type, family, head_dim=16)
    model = tiny_model(config)
    decoder = decoder_config(config)
    for kind in decoder.rope_kinds:
        arguments = () if kind is None else (kind,)
        rotary = model.model.rotary_emb
        expected = rotary(torch.empty(0), torch.arange(seq_len)[None], *arguments)
        tables = rope_tables(config, seq_len, torch.device("cpu"), kind)
        for ours, theirs in zip(tables, expected, strict=True):
            assert ours.dtype is torch.float32
            assert ours.shape == (seq_len, decoder.head_dim)
            assert torch.equal(ours, theirs[0])


@pytest.mark.parametrize("seq_len", [12, 13])
def test_part_of_a_head_is_rotated_and_long_rows_take_the_long_factors(seq_len: int) -> None:
    config = tiny_config("phi3-partial")
    expected = tiny_model(config).model.rotary_emb(torch.empty(0), torch.arange(seq_len)[None])
    ours = rope_tables(config, seq_len, torch.device("cpu"))
    assert decoder_config(config).rotary_dim == model_spec(config).rotary_dim == 12
    for table, theirs in zip(ours, expected, strict=True):
        assert table.shape == (seq_len, 12)
        assert torch.equal(table, theirs[0])
    longer = rope_tables(config, 14 if seq_len == 13 else 13, torch.device("cpu"))
    assert torch.equal(longer[0][:12], ours[0][:12]) is (seq_len == 13)


def test_rope_tables_differ_between_scalings() -> None:
    """The comparison above would notice a scaling that is not applied."""
    tables = [rope_tables(_roped(name), 96, torch.device("cpu"))[0] for name in ROPE_TYPES]
    for i, one in enumerate(tables):
        assert not any(torch.equal(one, other) for other in tables[:i])


def _roped(rope_type: str, family: str = "llama", **settings: Any) -> PretrainedConfig:
    rope: dict[str, Any] = {"rope_type": rope_type, "rope_theta": 5000.0, **ROPES[rope_type]}
    if family == "gemma3_text":
        local = {"rope_type": "default", "rope_theta": 100.0}
        rope = {"full_attention": rope, "sliding_attention": local}
    return tiny_config(family, rope_parameters=rope, **settings)


PUBLISHED = {
    "llama3-1b": 1_235_814_400,
    "llama3-3b": 3_212_749_824,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama2-13b": 13_015_864_320,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "mistral-large-123b": 122_610_069_504,
    "phi3-mini": 3_821_079_552,
    "phi4-mini": 3_836_021_760,
    "phi4-14b": 14_659_507_200,
    "mixtral-8x7b": 46_702_792_704,
    "qwen3-30b-a3b": 30_532_122_624,
    "gemma2-2b": 2_614_341_888,
    "gemma2-9b": 9_241_705_984,
    "gemma3-1b": 999_885_952,
}


def test_named_shapes_have_their_published_sizes() -> None:
    sizes = {name: model_spec(shape_config(name)).param_count for name in SHAPE_NAMES}
    assert sizes.pop("tiny") < 1_000_000
    assert sizes == PUBLISHED


@pytest.mark.parametrize(
    ("shape", "active"), [("mixtral-8x7b", 12.9e9), ("qwen3-30b-a3b", 3.3e9), ("qwen3-8b", 8.2e9)]
)
def test_a_token_uses_the_published_number_of_parameters(shape: str, active: float) -> None:
    spec = model_spec(shape_config(shape))
    matrices = 2 * spec.vocab * spec.hidden
    used = matrices + sum(unit.matrix_numel for unit in spec.layers)
    assert used == pytest.approx(active, rel=0.02)


def test_named_shapes_do_not_share_state() -> None:
    first = shape_config("llama3-3b")
    first.rope_parameters["factor"] = 1.0
    assert shape_config("llama3-3b").rope_parameters["factor"] == 32.0


def test_an_unknown_shape_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean llama3-8b"):
        shape_config("llama3-8B")


def test_a_family_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another family needs nothing but an entry, where its layer is of the known kind."""
    entry = Family(rotary="LlamaRotaryEmbedding", windows=lambda c: (2,) * c.num_hidden_layers)
    monkeypatch.setattr("slideformer.models.families.FAMILIES", {"llama": entry})
    assert decoder_config(tiny_config("llama")).windows == (2, 2, 2)
