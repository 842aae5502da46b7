"""A training run's state on disk and its learning rate: checkpoints appear whole or not at all."""

import logging
import math
import re
import shutil
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor
from torch.optim import Optimizer

from stablesr_kit.errors import ConfigError
from stablesr_kit.training.config import RunConfig

logger = logging.getLogger(__name__)


def start_run(config: RunConfig) -> Accelerator:
    """Accelerator of a seeded run; its main process logs to the screen and to output_dir/log.txt."""
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    output_dir = Path(config.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    if accelerator.is_main_process:
        config.save(output_dir / "config.yaml")
        logging.basicConfig(
            level=logging.INFO,
            format="%(asctime)s %(name)s: %(message)s",
            handlers=[logging.StreamHandler(), logging.FileHandler(output_dir / "log.txt")],
        )
    set_seed(config.seed)
    return accelerator


def learning_rate(config: RunConfig, step: int) -> float:
    """Learning rate of one step: linear warm-up, plateau, half a cosine down to the final rate.

    A function of the step and the options alone, so a run may be lengthened or shortened when it is resumed.
    """
    if step < config.lr_warmup_steps:
        return config.learning_rate * (step + 1) / config.lr_warmup_steps
    decay_steps = config.lr_decay_fraction * config.max_train_steps
    progress = min(max(1 - (config.max_train_steps - step) / decay_steps, 0.0), 1.0)
    fall = config.learning_rate - config.final_learning_rate
    return config.final_learning_rate + fall * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Let every parameter group of the optimizer step at this rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def save_checkpoint(accelerator: Accelerator, config: RunConfig, step: int) -> None:
    """Write output_dir/checkpoint-STEP beside its final name, rename it, and delete checkpoints beyond the limit."""
    final = Path(config.output_dir) / f"checkpoint-{step}"
    unfinished = final.with_name(final.name + ".unfinished")
    accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(final, ignore_errors=True)
        unfinished.rename(final)
        for old in _checkpoints(config.output_dir)[: -config.checkpoints_total_limit]:
            shutil.rmtree(old)


def resume(accelerator: Accelerator, config: RunConfig) -> int:
    """Load the state that the options ask for and return the number of steps it has behind it; 0 when none."""
    if config.resume_from_checkpoint is None:
        return 0
    if config.resume_from_checkpoint == "latest":
        whole = _checkpoints(config.output_dir)
        if not whole:
            return 0
        folder = whole[-1]
    else:
        folder = Path(config.resume_from_checkpoint)
        if not folder.is_dir():
            raise ConfigError(f"resume_from_checkpoint={folder} is no folder; give latest, or a checkpoint-STEP folder")
    accelerator.load_state(str(folder))
    step = _step_of(folder)
    logger.info("resumed %s at step %d of %d", folder, step, config.max_train_steps)
    return step


def _checkpoints(output_dir: str) -> list[Path]:
    """Whole checkpoint folders, oldest first."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(folders, key=_step_of)


def _step_of(folder: Path) -> int:
    match = re.search(r"(\d+)$", folder.name)
    if match is None:
        raise ConfigError(f"{folder} must be named checkpoint-STEP")
    return int(match.group(1))


class RunningMean:
    """Mean of each named loss since it was last read."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {}

    def add(self, **losses: Tensor) -> None:
        """Count one step's losses, scalar tensors."""
        for name, value in losses.items():
            self.values.setdefault(name, []).append(float(value))

    def read(self) -> str:
        """The means as text; counting starts again."""
        text = " ".join(f"{name} {sum(values) / len(values):.4f}" for name, values in self.values.items())
        self.values = {}
        return text
