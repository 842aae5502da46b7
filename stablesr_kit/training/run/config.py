"""Options of a training program: frozen dataclasses filled by a YAML file and by `--key value` flags."""

import dataclasses
import difflib
import os
import sys
import traceback
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml

from stablesr_kit.errors import ConfigError, StableSRKitError

WARMUP_PLATEAU_COSINE = "warmup_plateau_cosine"
MULTISTEP = "multistep"
"""Our own courses of the learning rate."""

TRACKERS = ("tensorboard", "wandb")
"""What a run can be watched with."""


@dataclass(frozen=True, kw_only=True)
class CheckedOptions:
    """Options that a program is composed of. A class that checks its own in __post_init__ hands on to the next one."""

    def __post_init__(self) -> None:
        """Nothing is left to check."""


@dataclass(frozen=True, kw_only=True)
class ProgramConfig(CheckedOptions):
    """What every program has in common."""

    output_dir: str
    """Folder of everything the program writes; its resolved options are there too, as config.yaml."""
    seed: int = 0
    """Seed of the initial weights, of the crops and of the noise."""

    def save(self, path: Path) -> None:
        """Write every option, the defaults too, as YAML."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(dataclasses.asdict(self), sort_keys=False))


@dataclass(frozen=True, kw_only=True)
class LoaderOptions(CheckedOptions):
    """Options of programs that read their samples in batches."""

    dataloader_num_workers: int = 0
    """Processes that prepare batches beside each process of the program; 0 prepares them in it."""


@dataclass(frozen=True, kw_only=True)
class RunConfig(LoaderOptions, ProgramConfig):
    """What every training run has in common: how long it lasts, how it steps, when it saves."""

    mixed_precision: str = "bf16"
    """Precision of the networks' arithmetic under autocast: no, fp16 or bf16; the weights stay in float32."""
    train_batch_size: int = 8
    """Samples per process and batch."""
    gradient_accumulation_steps: int = 1
    """Batches whose gradients make one optimizer step."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, about a third slower."""
    max_train_steps: int
    """Optimizer steps of the whole run; the learning rate's schedule ends there."""
    learning_rate: float = 1e-4
    """Highest learning rate."""
    scale_lr: bool = False
    """Multiply learning_rate by the number of samples of an optimizer step."""
    lr_scheduler: str = WARMUP_PLATEAU_COSINE
    """Course of the learning rate: warmup_plateau_cosine, multistep, or a name of diffusers.get_scheduler."""
    lr_warmup_steps: int = 50
    """Steps over which the learning rate rises linearly from zero."""
    final_learning_rate: float = 0.0
    """Learning rate that warmup_plateau_cosine ends at."""
    lr_decay_fraction: float = 1.0
    """Last part of the run over which warmup_plateau_cosine falls along a half cosine; 1 means from the warm-up on."""
    lr_milestones: tuple[int, ...] = ()
    """Steps from which on multistep halves the learning rate once more."""
    lr_num_cycles: int = 1
    """Restarts of cosine_with_restarts."""
    lr_power: float = 1.0
    """Power of polynomial."""
    use_8bit_adam: bool = False
    """Keep AdamW's states in 8 bits; needs bitsandbytes and a GPU."""
    adam_beta1: float = 0.9
    """Decay of AdamW's mean of the gradients."""
    adam_beta2: float = 0.999
    """Decay of AdamW's mean of the squared gradients."""
    adam_weight_decay: float = 1e-2
    """Decoupled weight decay of AdamW."""
    adam_epsilon: float = 1e-8
    """What AdamW adds to the root of the mean squared gradients."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this total norm."""
    ema_decay: float = 0.999
    """Decay of the moving average of the weights, which is what is saved as the result; 0 keeps none."""
    checkpointing_steps: int = 1000
    """A checkpoint is written every so many steps, and at the end."""
    checkpoints_total_limit: int | None = 2
    """Older checkpoints beyond this number are deleted; None keeps all."""
    resume_from_checkpoint: str | None = "latest"
    """Checkpoint folder to continue from; latest takes the newest whole one; None starts afresh."""
    logging_steps: int = 50
    """The mean loss of every so many steps goes to the log."""
    report_to: str = "none"
    """Where losses, learning rate, samples per second and validation pictures are shown: none, tensorboard (in
    output_dir/logs), wandb, or all."""
    tracker_project_name: str = "stablesr-kit"
    """Name of the project there."""
    push_to_hub: bool = False
    """Upload the results, the model card and the records to the Hugging Face hub at the end; needs a login."""
    hub_model_id: str | None = None
    """Repository there, NAME or OWNER/NAME; None takes the name of output_dir."""
    hub_private: bool = False
    """Whether the repository is private if it is made."""
    allow_tf32: bool = False
    """Let GPUs since Ampere multiply float32 matrices with 10 bits of mantissa: faster, less exact."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mixed_precision not in ("no", "fp16", "bf16"):
            raise ConfigError(f"mixed_precision={self.mixed_precision!r} must be no, fp16 or bf16")
        for name in (
            "train_batch_size",
            "gradient_accumulation_steps",
            "max_train_steps",
            "checkpointing_steps",
            "checkpoints_total_limit",
            "logging_steps",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if self.report_to not in ("none", "all", *TRACKERS):
            raise ConfigError(f"report_to={self.report_to!r} must be one of none, {', '.join(TRACKERS)}, all")
        if self.hub_model_id is not None and not self.push_to_hub:
            raise ConfigError(f"hub_model_id={self.hub_model_id} is given without push_to_hub; give both or none")
        if not 0 < self.lr_decay_fraction <= 1:
            raise ConfigError(f"lr_decay_fraction={self.lr_decay_fraction} must lie in (0, 1]")
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"ema_decay={self.ema_decay} must lie in [0, 1)")


Config = TypeVar("Config", bound=ProgramConfig)


def load_config(kind: type[Config], arguments: Sequence[str]) -> Config:
    """Options of a program from its command line `--config FILE [--key value ...]`; a flag overrides the file.

    Environment variables in values (`$DATA/photos`) are expanded. Raises ConfigError.
    """
    merged = given_options(arguments)
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key in merged:
        if key not in fields:
            nearest = difflib.get_close_matches(key, fields, n=1, cutoff=0)[0]
            raise ConfigError(f"unknown option {key!r}; did you mean {nearest!r}?")
    required = [name for name, field in fields.items() if field.default is field.default_factory is dataclasses.MISSING]
    if missing := [name for name in required if name not in merged]:
        raise ConfigError(f"{', '.join(missing)} must be given, in --config FILE or as --{missing[0]} VALUE")
    return kind(**{key: _convert(key, value, hints[key]) for key, value in merged.items()})


def given_options(arguments: Sequence[str]) -> dict[str, Any]:
    """What a command line gives, in its file and its flags, as it stands there. Raises ConfigError."""
    values = dict(_flags(arguments))
    file = values.pop("config", None)
    if file is None:
        return values
    try:
        content = yaml.safe_load(Path(str(file)).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {file} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file} holds no `key: value` lines")
    return content | values


def _flags(arguments: Sequence[str]) -> list[tuple[str, Any]]:
    """Pairs (key, value) of `--key value` and `--key=value`."""
    pairs: list[tuple[str, Any]] = []
    words = iter(arguments)
    for word in words:
        if not word.startswith("--"):
            raise ConfigError(f"expected --key value, got {word!r}")
        key, has_value, text = word[2:].partition("=")
        if not has_value:
            following = next(words, None)
            if following is None:
                raise ConfigError(f"--{key} needs a value")
            text = following
        pairs.append((key, yaml.safe_load(text)))
    return pairs


def _convert(key: str, value: Any, hint: Any) -> Any:
    """The YAML value as the type of the field: paths expanded, floats for integers, tuples for lists and values."""
    if isinstance(hint, types.UnionType):
        if value is None and type(None) in hint.__args__:
            return None
        hint = next(option for option in hint.__args__ if option is not type(None))
    origin = typing.get_origin(hint) or hint
    if origin is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(_convert(key, item, typing.get_args(hint)[0]) for item in items)
    if origin is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 reads 1e-4 as text
        except ValueError:
            pass
    elif isinstance(value, str) and origin is str:
        return os.path.expanduser(os.path.expandvars(value))
    elif isinstance(value, origin) and not (origin is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"{key}={value!r} must be {getattr(hint, '__name__', hint)}")


def launch(main: Callable[[Config], None], kind: type[Config]) -> None:
    """Run `main` with the options of the command line.

    What a user can cause ends the program with one line on stderr: exit status 2 for its options, 1 for the rest.
    """
    try:
        main(load_config(kind, sys.argv[1:]))
    except ConfigError as error:
        _end(error, 2)
    except StableSRKitError as error:
        _end(error, 1)


def _end(error: StableSRKitError, status: int) -> NoReturn:
    traceback.clear_frames(error.__traceback__)  # ends the loop that was running, and with it its progress bar
    sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
    raise SystemExit(status)
