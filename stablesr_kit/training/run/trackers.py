"""Where people watch a run: TensorBoard and Weights & Biases, through accelerate."""

import dataclasses
import importlib.util
import uuid
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from stablesr_kit.errors import ConfigError
from stablesr_kit.training.run.config import TRACKERS, RunConfig


def find_trackers(report_to: str) -> list[str]:
    """The trackers that the option names. Raises ConfigError where one is not installed."""
    names = {"none": [], "all": list(TRACKERS)}.get(report_to, [report_to])
    if missing := [name for name in names if importlib.util.find_spec(name) is None]:
        raise ConfigError(
            f"report_to={report_to} needs {' and '.join(missing)}; "
            "install with `pip install 'stablesr-kit[trackers]'`, or take another of "
            f"{', '.join(['none', *TRACKERS])}"
        )
    return names


def start_trackers(accelerator: Accelerator, config: RunConfig, step: int) -> None:
    """Start the trackers' run, or resume it after a step; what it holds of later steps is replaced.

    Raises ConfigError where a tracker cannot start.
    """
    folder = Path(config.output_dir) / "logs"
    own: dict[str, dict[str, Any]] = {"tensorboard": {"purge_step": step + 1 if step else 0}}
    if "wandb" in find_trackers(config.report_to) and accelerator.is_main_process:
        name = Path(config.output_dir).name
        own["wandb"] = {"id": _wandb_id(folder, step), "resume": "allow", "name": name, "dir": str(folder)}
    options = {name: _plain(value) for name, value in dataclasses.asdict(config).items()} if step == 0 else None
    try:
        accelerator.init_trackers(config.tracker_project_name, options, own)
    except Exception as error:  # of the tracker's own classes, such as a login that is missing
        raise ConfigError(
            f"report_to={config.report_to} cannot start: {error}; "
            "log in (`wandb login`), set WANDB_MODE=offline, or use report_to=tensorboard"
        ) from error


def show_pictures(accelerator: Accelerator, pictures: dict[str, np.ndarray], step: int) -> None:
    """Hand pictures (H, W, 3) uint8 by name to every tracker. Call it on the main process."""
    for tracker in accelerator.trackers:
        for name, pixels in pictures.items():
            kwargs = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({name: pixels[None]}, step=step, **kwargs)


def _wandb_id(folder: Path, step: int) -> str:
    """The id of the run, the one it had where it is resumed."""
    file = folder / "wandb_id"
    if step > 0 and file.exists():
        return file.read_text().strip()
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(uuid.uuid4().hex[:8] + "\n")
    return file.read_text().strip()


def _plain(value: Any) -> int | float | str:
    """The value as a table of hyperparameters can hold it."""
    return value if isinstance(value, int | float | str) else str(value)
