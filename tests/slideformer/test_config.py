"""The settings: defaults, sizes, YAML under flags, and one clear line for each mistake."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from slideformer.config import (
    Config,
    EngineConfig,
    format_size,
    load_config,
    parse_size,
    save_config,
)
from slideformer.graph.errors import ConfigError
from slideformer.models.data.sources import Source

REQUIRED = {"model": "m", "data": "d.jsonl", "output": "o"}


def complaint(path: Path | str | None = None, **settings: object) -> str:
    """The message with which these settings are refused."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, settings)
    return str(caught.value)


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 * 2**30),
        ("100 GB", 100 * 10**9),
        ("1.5 TiB", 3 * 2**39),
        ("0.3kb", 300),
        (" 7 mib ", 7 * 2**20),
        ("12", 12),
        ("12B", 12),
        (12, 12),
        ("9007199254740993", 2**53 + 1),
    ],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GiB", "24G", "24 Gib/s", "-1GiB", "1e3", "1,5GiB", "٣GiB", ".5GiB", -1, True]
)
def test_what_is_no_size(text: str | int) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_size(text)
    assert str(caught.value).startswith(f"{text!r} is not a size; write it like 24GiB")


@given(st.integers(0, 2**50))
def test_format_size_reads_back_to_half_a_hundredth(size: int) -> None:
    text = format_size(size)
    unit = parse_size("1" + text.split()[1])
    assert abs(parse_size(text) - size) <= unit / 200 + 1


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.50 KiB"), (2**30, "1.00 GiB"), (2**42, "4096.00 GiB")],
)
def test_format_size(size: int, text: str) -> None:
    assert format_size(size) == text


def test_defaults() -> None:
    config = load_config(None, REQUIRED)
    assert config.model_dump() == {
        "version": 1,
        "model": Path("m"),
        "data": ({"path": Path("d.jsonl"), "weight": 1.0, "split": "train"},),
        "validation": (),
        "validation_split": None,
        "output": Path("o"),
        "gpu_memory": None,
        "cpu_memory": None,
        "nvme": (),
        "nvme_memory": None,
        "nvme_write_limit": None,
        "nvme_checksums": True,
        "batch_size": 8,
        "accumulate": 1,
        "seq_len": 1024,
        "packing": False,
        "steps": None,
        "epochs": None,
        "lr": 1e-5,
        "beta1": 0.9,
        "optimizer": "adamw",
        "beta2": None,
        "eps": 1e-8,
        "weight_decay": 0.0,
        "parameter_groups": (),
        "lora": None,
        "max_grad_norm": None,
        "skip_nonfinite": False,
        "label_smoothing": 0.0,
        "z_loss": 0.0,
        "seed": 0,
        "device": "auto",
        "compute": "bf16",
        "policy": "earliest-deadline",
        "micro_batch": None,
        "window": None,
        "threads": None,
        "deterministic": False,
        "checkpoint_every": None,
        "keep_checkpoints": 2,
        "evaluate_every": None,
        "patience": None,
        "log_every": 1,
        "trace": None,
        "tensorboard": None,
        "wandb": None,
        "schedule": "constant",
        "warmup_steps": 0,
        "min_lr": 0.0,
        "cycles": None,
        "decay_steps": None,
    }


def test_an_engine_needs_the_model_only_and_refuses_what_concerns_a_run() -> None:
    config = load_config(None, REQUIRED)
    engine = EngineConfig(model=Path("m"))
    shared = {name: getattr(config, name) for name in EngineConfig.model_fields}
    assert engine.model_dump() == shared
    assert isinstance(config, EngineConfig)
    with pytest.raises(ConfigError, match="unknown setting 'data'; the settings are model, gpu"):
        EngineConfig(model=Path("m"), data=Path("d"))  # type: ignore[call-arg]


def test_every_setting_is_described() -> None:
    for name, field in Config.model_fields.items():
        assert str(field.description).endswith("."), name


def test_the_config_is_frozen() -> None:
    config = load_config(None, REQUIRED)
    with pytest.raises(ValidationError, match="frozen"):
        config.lr = 1.0  # type: ignore[misc]


def test_flags_override_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "model: m\ndata: d\noutput: o\nlr: 1e-4\ngpu_memory: 24GiB\nseed: 3\n")
    config = load_config(path, {"lr": 2e-4, "cpu_memory": "100 GB", "seed": None, "data": "x"})
    assert (config.lr, config.seed, config.data) == (2e-4, 3, (Source(Path("x")),))
    assert (config.gpu_memory, config.cpu_memory) == (24 * 2**30, 100 * 10**9)


def test_data_is_a_path_or_several_with_weights(tmp_path: Path) -> None:
    text = "model: m\noutput: o\ndata: [a.jsonl, ~/b.jsonl, {path: c.txt, weight: 0.5}]\n"
    config = load_config(write(tmp_path, text), {"validation": ["v.jsonl", "w.jsonl"]})
    assert config.data == (
        Source(Path("a.jsonl")),
        Source(Path.home() / "b.jsonl"),
        Source(Path("c.txt"), 0.5),
    )
    assert [source.path.name for source in config.validation] == ["v.jsonl", "w.jsonl"]
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml", {}) == config
    with pytest.raises(ConfigError, match=r"data is \(\): it should have at least 1 item"):
        Config(**{**REQUIRED, "data": []})


@pytest.mark.parametrize(("name", "other"), [("steps", "epochs"), ("epochs", "steps")])
def test_a_flag_for_steps_replaces_epochs_and_back(tmp_path: Path, name: str, other: str) -> None:
    path = write(tmp_path, f"{other}: 2\n")
    config = load_config(path, {**REQUIRED, name: 5})
    assert (getattr(config, name), getattr(config, other)) == (5, None)


def test_home_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert load_config(None, {**REQUIRED, "model": "~/m"}).model == Path("/home/someone/m")


def test_saved_and_loaded_is_equal(tmp_path: Path) -> None:
    settings = {**REQUIRED, "gpu_memory": "1.5GiB", "eps": 1e-12, "lr": 0.1 + 0.2, "steps": 7}
    config = load_config(None, {**settings, "output": "söme folder", "deterministic": True})
    path = tmp_path / "slideformer.yaml"
    path.write_text("not: [yaml")
    save_config(config, path)
    assert load_config(path, {}) == config
    assert yaml.safe_load(path.read_text(encoding="utf-8"))["gpu_memory"] == 3 * 2**29
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("batchsize", "batch_size"),
        ("gpu_mem", "gpu_memory"),
        ("Learning-rate", None),
        ("LR", "lr"),
        ("micro-batch", "micro_batch"),
        ("step", "steps"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(name: str, nearest: str | None) -> None:
    hint = (
        f"did you mean {nearest!r}?"
        if nearest
        else "the settings are model, gpu_memory, cpu_memory"
    )
    for refuse in (
        lambda: load_config(None, {**REQUIRED, name: 1}),
        lambda: Config(**{**REQUIRED, name: 1}),  # type: ignore[arg-type]
    ):
        with pytest.raises(ConfigError) as caught:
            refuse()
        assert f"unknown setting {name!r}; {hint}" in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"batch_size": 0},
            "batch_size is 0: it should be greater than or equal to 1; the default",
        ),
        ({"batch_size": True}, "batch_size is True: it should be a valid integer"),
        ({"batch_size": 8.0}, "batch_size is 8.0: it should be a valid integer"),
        ({"seq_len": 1}, "seq_len is 1: it should be greater than or equal to 2"),
        ({"steps": 0}, "equal to 1; it can be left out"),
        ({"max_grad_norm": 0}, "max_grad_norm is 0: it should be greater than 0; it can be left"),
        ({"lr": -1e-5}, "lr is -1e-05: it should be greater than or equal to 0"),
        ({"lr": float("inf")}, "lr is inf: it should be a finite number"),
        ({"lr": float("nan")}, "lr is nan: it should be"),
        ({"lr": "fast"}, "lr is 'fast': it should be a valid number"),
        ({"lr": True}, "lr: True is not a number; write it like 1e-5"),
        ({"beta2": 1.0}, "beta2 is 1.0: it should be less than 1; it can be left out"),
        ({"optimizer": "sgd"}, "optimizer is 'sgd': it should be 'adamw', 'adamw8bit' or 'lion'"),
        ({"eps": 0}, "eps is 0: it should be greater than 0"),
        ({"seed": 2**63}, "seed is 9223372036854775808: it should be less than"),
        ({"device": "tpu"}, "device is 'tpu': it should be 'auto', 'cuda' or 'cpu'"),
        ({"compute": "fp16"}, "compute is 'fp16': it should be 'bf16' or 'fp32'"),
        ({"policy": ""}, "policy is '': it should have at least 1 character"),
        ({"window": 1}, "window is 1: it should be greater than or equal to 2; it can be left"),
        ({"deterministic": "yes"}, "deterministic is 'yes': it should be a valid boolean"),
        ({"gpu_memory": "24G"}, "gpu_memory: '24G' is not a size; write it like 24GiB"),
        ({"cpu_memory": 100}, "cpu_memory: 100 is 100 B, below the least budget of 1.00 MiB"),
        ({"data": " "}, "data: ' ' is not a path"),
        ({"output": "a\0b"}, r"output: 'a\x00b' is not a path: it has a null character"),
        ({"output": "x" * 300}, "is not a path: a name in it is longer than 255 bytes"),
        ({"nvme": ["a", "ü" * 130]}, "is not a path: a name in it is longer than 255 bytes"),
        ({"data": "d/" + "x" * 300}, "is not a path: a name in it is longer than 255 bytes"),
        ({"data": ["a", 3]}, "data: 3 is not a path; name a file"),
        ({"data": [{"path": "a", "weight": 0}]}, "data: the weight of a is 0; it must be a number"),
        ({"data": [{"path": "a", "weight": True}]}, "data: the weight of a is True; it must"),
        ({"data": [{"path": "a", "wieght": 2}]}, "is no source; write a path, or path, weight"),
        ({"data": [{"weight": 2}]}, "is no source; write a path, or path, weight"),
        ({"validation_split": 1.0}, "validation_split is 1.0: it should be less than 1"),
        (
            {"validation_split": 0.1, "validation": "v.jsonl"},
            "validation is v.jsonl and validation_split is 0.1; give only one of them",
        ),
        ({"validation": {"path": "v", "weight": 2}}, "validation has weights; they belong to data"),
        ({"model": 3}, "model is 3: it is not a valid path"),
        ({"version": 2}, "version is 2: it should be 1"),
        ({"steps": 1, "epochs": 2}, "steps is 1 and epochs is 2; give only one of them"),
        ({"micro_batch": 3}, "does not divide batch_size 8; use one of 1, 2, 4, 8 or leave it out"),
        (
            {"batch_size": 10**9 - 7, "micro_batch": 2, "accumulate": 2},
            "together 1999999986 rows a step; lower them to at most 1048576",
        ),
        ({"batch_size": 10**30}, "it should be less than or equal to 1000000000"),
        ({"threads": 10**6}, "threads is 1000000: it should be less than or equal to 1024"),
        ({"window": 10**9}, "window is 1000000000: it should be less than or equal to 1024"),
        ({"cpu_memory": "9999999999GiB"}, "is above 1073741824.00 GiB, which no memory has"),
        ({"gpu_memory": 2**70}, "is above 1073741824.00 GiB"),
        ({"data": [{"path": "a", "weight": 1e12}]}, "it must be a number above 0 and at most 1000"),
        ({"micro_batch": 16}, "micro_batch is 16, which does not divide batch_size 8"),
    ],
)
def test_a_wrong_value_is_refused_with_limit_and_way_out(
    settings: dict[str, object], words: str
) -> None:
    message = complaint(**{**REQUIRED, **settings})
    assert words in message
    assert "\n" not in message


def test_every_problem_has_its_line_and_its_source(tmp_path: Path) -> None:
    path = write(tmp_path, "model: m\nbatchsize: 4\nlr: high\nseq_len: 0\n1: 2\n")
    lines = complaint(path, output="o", seq_len=1, log_every=0).splitlines()
    assert sorted(line.split(";")[0] for line in lines) == sorted(
        [
            "data is not set",
            f"{path}: unknown setting 'batchsize'",
            f"{path}: unknown setting '1'",
            f"{path}: lr is 'high': it should be a valid number, "
            "unable to parse string as a number",
            "--seq-len: seq_len is 1: it should be greater than or equal to 2",
            "--log-every: log_every is 0: it should be greater than or equal to 1",
        ]
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: m\nlr: [1\nseed: 3\n", ", line 3: not valid YAML"),
        ("model: m\n\tlr: 1\n", ", line 2: not valid YAML"),
        ("a: 'open", ", line 1: not valid YAML"),
        ("model: !!python/name:os.system x\n", ", line 1: not valid YAML"),
        ("- model\n", ": holds a list; write one 'name: value' per line"),
        ("model", ": holds a str"),
        ("data: 2026-13-01\n", ": not valid YAML: month must be"),
        ("\0", ": not a text file in UTF-8"),
        ("[" * 5000, ": not valid YAML: nested too deeply"),
        ("lr: 1\nmodel: m\nlr: 2\n", ", line 3: not valid YAML: 'lr' is set a second time; write"),
        ("lora:\n  rank: 1\n  rank: 2\n", ", line 3: not valid YAML: 'rank' is set a second time"),
    ],
)
def test_a_malformed_file_is_named_with_its_line(tmp_path: Path, text: str, words: str) -> None:
    path = write(tmp_path, text)
    assert complaint(path).startswith(f"{path}{words}")


@pytest.mark.parametrize("name", ["nvme_memory", "nvme_write_limit"])
def test_limits_of_nvme_need_a_folder(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name} is 2.00 GiB, but nvme is not set; name a fol"):
        Config(**REQUIRED, **{name: "2GiB"})
    assert getattr(Config(**REQUIRED, nvme="disk", **{name: "2GiB"}), name) == 2 << 30


def test_an_empty_file_sets_nothing(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "# nothing\n"), REQUIRED) == load_config(None, REQUIRED)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert complaint(tmp_path / "no.yaml").startswith(
        f"{tmp_path}/no.yaml: cannot be read: No such"
    )
    assert complaint(tmp_path).startswith(f"{tmp_path}: cannot be read: Is a directory")
