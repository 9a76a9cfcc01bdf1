"""Parameter groups: training with them equals a plain PyTorch loop with the same groups."""

from __future__ import annotations

import re
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

from slideformer.config import Config, load_config, save_config
from slideformer.graph.errors import ConfigError
from tests.support.engines import (
    check_equal,
    check_moved,
    check_same_bits,
    config_for,
    different,
    engine_with,
    make_batch,
    state_of,
    stored_weights,
    too_far,
    train,
    train_reference,
    write_model,
)

LR, DECAY = 5e-4, 0.5
BATCHES = [make_batch(seed) for seed in range(4)]
GROUPS: list[dict[str, Any]] = [
    {"pattern": "model.layers.1.*.q_proj.*", "lr": 1e-3},
    {"pattern": "*.[vq]_proj.weight", "lr_scale": 0.25, "weight_decay": 0.0},
    {"pattern": "model.embed_tokens.weight", "lr_scale": 3, "weight_decay": 0.1},
    {"pattern": "*.gate_proj.bias", "weight_decay": 0.3},
    {"pattern": "*.input_layernorm.weight", "lr": 0},
]
"""Some cut through operands that stack several parameters."""


def rates(name: str) -> dict[str, float]:
    """The rates of a parameter under `GROUPS`, as `torch.optim.AdamW` takes them."""
    for group in GROUPS:
        if fnmatchcase(name, group["pattern"]):
            found = {"lr": group.get("lr", LR * group.get("lr_scale", 1.0))}
            return found | {k: group[k] for k in ("weight_decay",) if k in group}
    return {}


@pytest.mark.parametrize("tied", [False, True])
def test_training_by_groups_equals_plain_pytorch(tied: bool, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "llama-biases", tied=tied)
    reference = train_reference(folder, BATCHES, lr=LR, weight_decay=DECAY, groups=rates)
    config = config_for(folder, lr=LR, weight_decay=DECAY, parameter_groups=GROUPS)
    found = train(config, BATCHES, chunk_numel=3000)
    check_equal(found, reference)
    without = train_reference(folder, BATCHES, lr=LR, weight_decay=DECAY)
    grouped = {name for name in found.weights if rates(name)}
    assert grouped <= {line.split(":")[0] for line in too_far(found.weights, without.weights)}


MIXED: list[dict[str, Any]] = [
    {"pattern": "model.layers.0.*", "frozen": True},
    {"pattern": "*.1.*norm.weight", "frozen": True},
    {"pattern": "*[qv]_proj.weight", "lr_scale": 2, "weight_decay": 0.0},
    {"pattern": "model.norm.weight", "lr": 2e-3},
]


@pytest.mark.parametrize(
    "variant", ["mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3_text", "mixtral"]
)
def test_twenty_steps_in_every_family(variant: str, tmp_path: Path) -> None:
    """Rates by name, frozen layers and frozen parts of others, all at once."""
    folder = write_model(tmp_path / "model", variant)
    start = stored_weights(folder)

    def group_of(name: str) -> dict[str, Any]:
        return next((g for g in MIXED if fnmatchcase(name, g["pattern"])), {})

    def own(name: str) -> dict[str, float]:
        group = group_of(name)
        found = {"lr": group.get("lr", LR * group.get("lr_scale", 1.0))}
        return found | {k: group[k] for k in ("weight_decay",) if k in group}

    frozen = {name for name in start if group_of(name).get("frozen")}
    batches = [make_batch(seed) for seed in range(20)]
    reference = train_reference(
        folder, batches, lr=LR, weight_decay=DECAY, groups=own, frozen=frozen
    )
    groups = [g for g in MIXED if any(group_of(name) is g for name in start)]
    config = config_for(folder, lr=LR, weight_decay=DECAY, parameter_groups=groups)
    found = train(config, batches, offloaded=2)
    check_equal(found, reference)
    assert set(different(found.weights, start)) == start.keys() - frozen
    check_moved(reference, start)


@pytest.mark.parametrize("tied", [False, True])
def test_where_units_are_updated_changes_no_bit(tied: bool, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "llama-biases", tied=tied)
    groups = {"parameter_groups": GROUPS, "weight_decay": DECAY}
    config = config_for(folder, compute="bf16", **groups)
    plans: list[dict[str, Any]] = [
        {},
        {"chunk_numel": 700, "threads": 3},
        {"resident": frozenset({"embed", "L01", "norm"})},
    ]
    outcomes = []
    for plan in plans:
        threads = plan.pop("threads", 1)
        outcomes.append(train(config.model_copy(update={"threads": threads}), BATCHES, **plan))
    check_same_bits(*outcomes)


def test_a_learning_rate_of_a_group_follows_the_step_in_proportion(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    group = [{"pattern": "*", "lr": 4e-3}]
    outcomes = []
    for config, lr in (
        (config_for(folder, lr=1e-3, parameter_groups=group), 2.5e-4),
        (config_for(folder, lr=1e-3), 1e-3),
    ):
        with engine_with(config) as engine:
            engine.step(BATCHES[0], lr=lr)
            outcomes.append(state_of(engine))
    assert different(*outcomes) == []


def refusal(act: Callable[[], object]) -> str:
    """The message with which it is refused: one line."""
    with pytest.raises(ConfigError) as caught:
        act()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_groups_that_cannot_work_with_the_model_are_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", tied=True)
    message = refusal(lambda: make(folder, [{"pattern": "lm_head.weight", "lr": 1}]))
    assert "group 1: pattern 'lm_head.weight' matches no parameter" in message
    assert "model.embed_tokens.weight" in message
    message = refusal(lambda: make(folder, [{"pattern": "*", "lr": 1e-3}], lr=0))
    assert re.search(r"group 1: lr is 0.001, which follows the run's lr .* is 0; set it", message)


def make(folder: Path, groups: list[dict[str, Any]], **settings: Any) -> None:
    """An engine of these groups."""
    with engine_with(config_for(folder, parameter_groups=groups, **settings)):
        pass


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ({"pattern": "*"}, "is not a list; write '- pattern: …' for each group"),
        (["*"], "group 1: '*' is not 'name: value' pairs; the names are pattern"),
        ([{"lr": 1}], "group 1: pattern is not set; the names are pattern, lr, lr_scale"),
        ([{"pattern": "*", "rate": 1}], "group 1: unknown name 'rate'; the names are pattern, lr"),
        (
            [{"pattern": "*"}, {"pattern": "*", "lr": -1}],
            "group 2: lr is -1: it should be greater than or equal to 0",
        ),
        (
            [{"pattern": "*", "lr": 1, "lr_scale": 2}],
            "group 1: lr is 1.0 and lr_scale is 2.0; give only one of them",
        ),
        ([{"pattern": ""}], "group 1: pattern is '': it should have at least 1 character"),
    ],
)
def test_wrong_groups_are_refused_in_one_line(groups: Any, words: str) -> None:
    message = refusal(lambda: Config(model="m", data="d", output="o", parameter_groups=groups))  # type: ignore[arg-type]
    assert message.startswith("parameter_groups: ")
    assert words in message


def test_groups_are_saved_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: m\ndata: d\noutput: o\nparameter_groups:\n"
        "  - pattern: '*.mlp.*'\n    lr_scale: 0.1\n  - {pattern: '*bias', weight_decay: 0.2}\n"
    )
    config = load_config(path, {})
    assert [group.pattern for group in config.parameter_groups] == ["*.mlp.*", "*bias"]
    save_config(config, path)
    assert load_config(path, {}) == config
