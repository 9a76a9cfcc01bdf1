"""The settings of one fine-tuning run: a frozen model, read from YAML and flags, saved as YAML.

Checks what can be checked from the values alone. Whether the folders exist, the device is there
and the budgets suffice is found out by those who use them. Every complaint is a ``ConfigError``
with one line per problem.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from slideformer.graph.errors import ConfigError
from slideformer.settings.problems import describe, flag_name
from slideformer.settings.values import (
    MOST_ROWS,
    Budget,
    Count,
    Groups,
    Location,
    Locations,
    LoraBlock,
    Number,
    Sources,
)
from slideformer.settings.values import format_size as format_size
from slideformer.settings.values import parse_size as parse_size
from slideformer.settings.yaml_text import parse_yaml
from slideformer.whole_files import write_whole


class EngineConfig(BaseModel):
    """What an engine needs to know; frozen, and unknown names are refused with the nearest one.

    ``None`` leaves a choice to the program: budgets are then what the machine has, ``micro_batch``,
    ``window`` and ``threads`` what the planner picks.

    Raises ``ConfigError``, with one line per problem.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True
    )

    model: Location
    """Model folder to start from."""
    gpu_memory: Budget = None
    """Bytes the run may use on the GPU; accepts sizes like ``"24GiB"``."""
    cpu_memory: Budget = None
    """Bytes the run may use on the host; accepts sizes like ``"100 GB"``."""
    nvme: Locations = ()
    """Folder on an NVMe disk for state that does not fit the host; several are striped."""
    nvme_memory: Budget = None
    """Bytes the run may use in these folders, all together; without it, most of what is free."""
    nvme_write_limit: Budget = None
    """Most bytes that a step may write to NVMe: writing wears the disk out."""
    nvme_checksums: bool = Field(default=True, strict=True)
    """Whether what is read from NVMe is checked against what was written."""
    batch_size: Count = 8
    """Rows per optimizer step, or of each of those that ``accumulate`` puts together."""
    accumulate: Count = 1
    """Batches per optimizer step; the gradient is that of all their tokens."""
    seq_len: int = Field(default=1024, strict=True, ge=2)
    """Tokens per row; longer documents are cut, shorter ones padded."""
    packing: bool = Field(default=False, strict=True)
    """Whether a row holds as many documents as fit; none sees another."""
    optimizer: Literal["adamw", "adamw8bit", "lion"] = "adamw"
    """Rule of the update: AdamW, with moments of FP32 or of 8 bits, or Lion, which keeps one moment
    instead of two and wants a lower ``lr``."""
    lr: Number = Field(default=1e-5, ge=0)
    """Learning rate."""
    beta1: Number = Field(default=0.9, ge=0, lt=1)
    """Decay of AdamW's first moment; share of the moment in the direction that Lion takes."""
    beta2: Number | None = Field(default=None, ge=0, lt=1)
    """Decay of AdamW's second moment, 0.999 if not given, or of Lion's only one, 0.99."""
    eps: Number = Field(default=1e-8, gt=0)
    """Term added to AdamW's denominator."""
    weight_decay: Number = Field(default=0.0, ge=0)
    """Decoupled weight decay, on matrices; norms and biases have none."""
    lora: LoraBlock = None
    """Adapters to train instead of the model's parameters: in the YAML file only."""
    parameter_groups: Groups = ()
    """Learning rates and weight decays of parameters by name: in the YAML file only."""
    max_grad_norm: Number | None = Field(default=None, gt=0)
    """Norm of all gradients together to which larger ones are scaled down, as PyTorch does."""
    skip_nonfinite: bool = Field(default=False, strict=True)
    """Whether a step with a gradient that is not finite is left out, instead of ending the run."""
    label_smoothing: Number = Field(default=0.0, ge=0, lt=1)
    """Share of each target's weight that is spread over the vocabulary, in training."""
    z_loss: Number = Field(default=0.0, ge=0)
    """Weight of the squared logarithm of each token's softmax denominator, in training."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where forward and backward run; ``auto`` is the GPU if there is one."""
    compute: Literal["bf16", "fp32"] = "bf16"
    """Precision of forward and backward; master weights are FP32 in both."""
    policy: str = Field(default="earliest-deadline", min_length=1)
    """Name of the scheduling policy."""
    micro_batch: Count | None = None
    """Rows per forward-backward pass; a divisor of ``batch_size``."""
    window: int | None = Field(default=None, strict=True, ge=2, le=1024)
    """How many units' weight slots are on the GPU at once."""
    threads: int | None = Field(default=None, strict=True, ge=1, le=1024)
    """Threads of the CPU update."""
    deterministic: bool = Field(default=False, strict=True)
    """Whether the GPU uses deterministic kernels only."""

    @property
    def step_rows(self) -> int:
        """Rows of an optimizer step."""
        return self.batch_size * self.accumulate

    @property
    def deferred(self) -> bool:
        """Whether no unit is updated before all gradients of its step are known."""
        return self.max_grad_norm is not None or self.skip_nonfinite

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.step_rows > MOST_ROWS:
            raise ValueError(
                f"batch_size is {self.batch_size} and accumulate is {self.accumulate}, together "
                f"{self.step_rows} rows a step; lower them to at most {MOST_ROWS}"
            )
        if self.micro_batch is not None and self.batch_size % self.micro_batch:
            divisors = [n for n in range(1, self.batch_size + 1) if self.batch_size % n == 0]
            raise ValueError(
                f"micro_batch is {self.micro_batch}, which does not divide batch_size "
                f"{self.batch_size}; use one of {', '.join(map(str, divisors))} or leave it out"
            )
        return self

    # Defined last, so that it also sees what _divides raises.
    @model_validator(mode="wrap")
    @classmethod
    def _explain(
        cls, data: Any, handler: ModelWrapValidatorHandler[Self], info: ValidationInfo
    ) -> Self:
        try:
            return handler(data)
        except ValidationError as error:
            sources: Mapping[str, str] = info.context or {}
            lines = [describe(cls, problem, sources) for problem in error.errors()]
            raise ConfigError("\n".join(lines)) from None


class Config(EngineConfig):
    """Everything a fine-tuning run needs to know.

    Relative paths are relative to the current directory. Without ``steps`` and ``epochs`` the run
    is one epoch.
    """

    version: Literal[1] = 1
    """Version of this format, written into saved files."""
    data: Sources = Field(min_length=1)
    """Training file, ``.jsonl`` or ``.txt``, or a Hugging Face data set; several are mixed."""
    validation: Sources = ()
    """File to validate with, or several."""
    validation_split: Number | None = Field(default=None, gt=0, lt=1)
    """Share of the training documents to set aside for validation, drawn by the seed."""
    output: Location
    """Folder for the fine-tuned model."""
    steps: Count | None = None
    """Optimizer steps to run."""
    epochs: Count | None = None
    """Passes over the data, instead of ``steps``."""
    seed: int = Field(default=0, strict=True, ge=0, lt=2**63)
    """Seed of the order of the data."""
    schedule: Literal["constant", "linear", "cosine", "cosine-restarts", "wsd"] = "constant"
    """How the learning rate goes on after the warm-up; ``wsd`` stays and decays at the end."""
    warmup_steps: int = Field(default=0, strict=True, ge=0)
    """Steps in which the learning rate rises to ``lr``."""
    min_lr: Number = Field(default=0.0, ge=0)
    """Learning rate at which the schedule ends."""
    cycles: Count | None = None
    """How often ``cosine-restarts`` goes down."""
    decay_steps: Count | None = None
    """Steps in which ``wsd`` goes down at the end."""
    checkpoint_every: Count | None = None
    """Steps between two checkpoints to resume from, beside the one that Ctrl-C leaves."""
    keep_checkpoints: Count = 2
    """How many of the last checkpoints are kept, beside the best one."""
    evaluate_every: Count | None = None
    """Steps between two evaluations of the validation data; there is one after the last step."""
    patience: Count | None = None
    """Evaluations without a lower validation loss after which the run stops."""
    log_every: Count = 1
    """Steps between two lines of progress."""
    trace: Location | None = None
    """Folder for a step's graph, ``step.json``, and when the last steps ran, ``trace.json``."""
    tensorboard: Location | None = None
    """Folder for TensorBoard's event files, written while the run trains."""
    wandb: str | None = Field(default=None, min_length=1)
    """Project of Weights & Biases to log to."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.steps is not None and self.epochs is not None:
            # What a subclass checks is outside _explain, so this is no ValueError.
            raise ConfigError(
                f"steps is {self.steps} and epochs is {self.epochs}; give only one of them"
            )
        if self.validation and self.validation_split is not None:
            raise ConfigError(
                f"validation is {', '.join(str(each.path) for each in self.validation)} and "
                f"validation_split is {self.validation_split}; give only one of them"
            )
        if any(source.weight != 1 for source in self.validation):
            raise ConfigError("validation has weights; they belong to data, so leave them out")
        if self.evaluate_every and not self.validation and self.validation_split is None:
            raise ConfigError(
                f"evaluate_every is {self.evaluate_every}, but there is nothing to evaluate: give "
                "validation or validation_split"
            )
        if self.patience and not self.evaluate_every:
            raise ConfigError(
                f"patience is {self.patience}, but evaluate_every is not set; give both or neither"
            )
        for name in ("nvme_memory", "nvme_write_limit"):
            if (size := getattr(self, name)) is not None and not self.nvme:
                raise ConfigError(
                    f"{name} is {format_size(size)}, but nvme is not set; name a folder with "
                    f"--nvme, or leave {name} out"
                )
        if self.min_lr > self.lr:
            raise ConfigError(
                f"min_lr is {self.min_lr}, above lr {self.lr}, from which a schedule goes down; "
                "lower it"
            )
        if self.min_lr and self.schedule == "constant":
            raise ConfigError(
                f"min_lr is {self.min_lr}, but schedule is constant; choose one that goes down, "
                "such as cosine, or leave min_lr out"
            )
        for name, needs in (("cycles", "cosine-restarts"), ("decay_steps", "wsd")):
            value = getattr(self, name)
            if (value is None) == (self.schedule == needs):
                found = "not set" if value is None else value
                raise ConfigError(
                    f"{name} is {found} and schedule is {self.schedule}; {name} belongs to "
                    f"{needs}, so give both or neither"
                )
        return self


CHANGEABLE = (
    *("model", "data", "validation", "output"),
    *("gpu_memory", "cpu_memory", "nvme", "nvme_memory", "nvme_write_limit", "nvme_checksums"),
    *("device", "policy", "window", "threads"),
    *("checkpoint_every", "keep_checkpoints", "patience"),
    *("log_every", "trace", "tensorboard", "wandb"),
)
"""Settings that a resumed run may have otherwise: where things lie, and what it shows."""


def load_config(path: Path | str | None, overrides: Mapping[str, object]) -> Config:
    """The config of a YAML file (if any) with flags put over it.

    ``overrides`` maps setting names to values; ``None`` or an empty list means that the flag was
    not given. A flag for ``steps`` replaces the file's ``epochs`` and the other way round. Raises
    ``ConfigError``.
    """
    return parse_config(_text_of(path), str(path), overrides)


def load_engine_config(path: Path | str | None, overrides: Mapping[str, object]) -> EngineConfig:
    """What an engine needs of such a file and flags; the settings of a run are not looked at.

    Raises ``ConfigError``.
    """
    settings = parse_yaml(_text_of(path), str(path))
    of_runs = Config.model_fields.keys() - EngineConfig.model_fields.keys()
    needed = {name: value for name, value in settings.items() if name not in of_runs}
    given = given_flags(overrides)
    sources = dict.fromkeys(needed, str(path)) | {name: flag_name(name) for name in given}
    return EngineConfig.model_validate({**needed, **given}, context=sources)


def given_flags(overrides: Mapping[str, object]) -> dict[str, object]:
    """Those flags that were given: of the others the value is ``None`` or an empty list."""
    return {name: value for name, value in overrides.items() if value not in (None, [], ())}


def _text_of(path: Path | str | None) -> bytes:
    if path is None:
        return b""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read: {error.strerror}; check the path given as --config"
        ) from None


def parse_config(text: str | bytes, source: str, overrides: Mapping[str, object]) -> Config:
    """`load_config` of the text of a file that errors call ``source``."""
    settings = parse_yaml(text, source)
    sources = dict.fromkeys(settings, source)
    given = given_flags(overrides)
    for name, other in (("steps", "epochs"), ("epochs", "steps")):
        if name in given:
            settings.pop(other, None)
    sources.update({name: flag_name(name) for name in given})
    return Config.model_validate({**settings, **given}, context=sources)


def save_config(config: Config, path: Path | str) -> None:
    """Write every setting as YAML that ``load_config`` reads back equal; replaces the file at once.

    Raises ``OSError`` if the file cannot be written.
    """
    write_whole(Path(path), config_text(config))


def config_text(config: Config) -> str:
    """Every setting as YAML that ``parse_config`` reads back equal."""
    settings = config.model_dump(mode="json")
    settings = {"version": settings.pop("version"), **settings}
    text: str = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    return text
