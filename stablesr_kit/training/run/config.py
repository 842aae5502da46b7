"""Options that training programs share, as frozen dataclasses; `command_line` fills them."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import yaml

from stablesr_kit.errors import ConfigError

if TYPE_CHECKING:  # torch takes seconds to load, and some programs do not need it
    import torch

WARMUP_PLATEAU_COSINE = "warmup_plateau_cosine"
MULTISTEP = "multistep"
"""Our own learning-rate schedules."""

TRACKERS = ("tensorboard", "wandb")
"""Supported trackers."""


@dataclass(frozen=True, kw_only=True)
class CheckedOptions:
    """A group of options. A class that checks its options in __post_init__ also calls super().__post_init__()."""

    def __post_init__(self) -> None:
        """The last check of the chain, which checks nothing."""


@dataclass(frozen=True, kw_only=True)
class ProgramConfig(CheckedOptions):
    """Options of every program."""

    output_dir: str
    """Folder for all results, with the resolved options in config.yaml."""
    seed: int = 0
    """Seed of initial weights, crops and noise."""

    def save(self, path: Path) -> None:
        """Write all options, including defaults, as YAML."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(dataclasses.asdict(self), sort_keys=False))


@dataclass(frozen=True, kw_only=True)
class LoaderOptions(CheckedOptions):
    """Options of programs that read their samples in batches."""

    dataloader_num_workers: int = 0
    """Loader processes per process of the program; 0 loads in the program itself."""


@dataclass(frozen=True, kw_only=True)
class PrecisionOptions(CheckedOptions):
    """Precision of the arithmetic."""

    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = "auto"
    """Precision of the networks under autocast; the weights stay in float32. auto is bf16 if the device supports it,
    else no (float32), since emulated bf16 is several times slower."""

    def precision_on(self, device: "torch.device") -> Literal["no", "fp16", "bf16"]:
        """The precision on this device."""
        from stablesr_kit.models.execution import has_bf16

        if self.mixed_precision == "auto":
            return "bf16" if has_bf16(device) else "no"
        return self.mixed_precision

    def autocast(self, device: "torch.device") -> "torch.autocast":
        """Autocast to that precision."""
        import torch

        name = self.precision_on(device)
        return torch.autocast(device.type, torch.float16 if name == "fp16" else torch.bfloat16, enabled=name != "no")


@dataclass(frozen=True, kw_only=True)
class RunConfig(PrecisionOptions, LoaderOptions, ProgramConfig):
    """Options of every training run: its length, its steps, its checkpoints."""

    train_batch_size: int = 8
    """Samples per process and batch."""
    gradient_accumulation_steps: int = 1
    """Batches whose gradients make one optimizer step."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them: less memory, about a third slower."""
    max_train_steps: int
    """Optimizer steps of the whole run; also the length of the learning-rate schedule."""
    learning_rate: float = 1e-4
    """Highest learning rate."""
    scale_lr: bool = False
    """Multiply learning_rate by the number of samples of an optimizer step."""
    lr_scheduler: str = WARMUP_PLATEAU_COSINE
    """Learning-rate schedule: warmup_plateau_cosine, multistep, or a name of diffusers.get_scheduler."""
    lr_warmup_steps: int = 50
    """Steps over which the learning rate rises linearly from zero."""
    final_learning_rate: float = 0.0
    """Learning rate that warmup_plateau_cosine ends at."""
    lr_decay_fraction: float = 1.0
    """Fraction of the run, at its end, in which warmup_plateau_cosine falls; 1: from the warm-up on."""
    lr_milestones: tuple[int, ...] = ()
    """Steps at which multistep halves the learning rate."""
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
    """AdamW's epsilon."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this total norm."""
    ema_decay: float = 0.999
    """Decay of the exponential moving average of the weights (EMA), which becomes the result; 0: no average."""
    checkpointing_steps: int = 1000
    """Steps between checkpoints; one more is written at the end."""
    checkpoints_total_limit: int | None = 2
    """Number of checkpoints to keep; older ones are deleted. None keeps all."""
    resume_from_checkpoint: str | None = "latest"
    """Checkpoint folder to resume from; latest: the newest complete one; None: start from the beginning."""
    logging_steps: int = 50
    """Steps over which the logged loss is averaged."""
    report_to: Literal["none", "tensorboard", "wandb", "all"] = "none"
    """Tracker for losses, learning rate, samples per second and validation pictures; tensorboard writes to
    output_dir/logs."""
    tracker_project_name: str = "stablesr-kit"
    """Project name in the tracker."""
    push_to_hub: bool = False
    """Upload the results, the model card and the records to the Hugging Face hub at the end; needs a login."""
    hub_model_id: str | None = None
    """Repository on the hub, NAME or OWNER/NAME; None takes the name of output_dir."""
    hub_private: bool = False
    """Whether a repository that is created is private."""
    allow_tf32: bool = False
    """Let GPUs since Ampere multiply float32 matrices with 10 bits of mantissa: faster, less exact."""

    def __post_init__(self) -> None:
        super().__post_init__()
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
        if self.hub_model_id is not None and not self.push_to_hub:
            raise ConfigError(f"hub_model_id={self.hub_model_id} is given without push_to_hub; give both or none")
        if not 0 < self.lr_decay_fraction <= 1:
            raise ConfigError(f"lr_decay_fraction={self.lr_decay_fraction} must lie in (0, 1]")
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"ema_decay={self.ema_decay} must lie in [0, 1)")
