"""Reports on a run: records, trackers, model card, and the upload to the Hugging Face hub."""

import dataclasses
import importlib.util
import json
import math
import shlex
import sys
import uuid
from collections.abc import Iterable, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from accelerate import Accelerator
from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import LocalTokenNotFoundError

from stablesr_kit.errors import ConfigError, OutputError
from stablesr_kit.storage import replacing_file
from stablesr_kit.training.run.config import TRACKERS, RunConfig
from stablesr_kit.training.run.state import writing
from stablesr_kit.version import __version__


class StepRecords:
    """Appends {"step": 1, NAME: ...} per step to a file.

    step: the last one that is done; records of later steps, left by a killed run, are removed. Raises OutputError if
    the file cannot be written.
    """

    def __init__(self, file: Path, step: int) -> None:
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        whole = [line for line in lines if line.endswith("}\n")]
        with writing(file):
            with replacing_file(file) as part:
                part.write_text("".join(line for line in whole if json.loads(line)["step"] <= step))
            # unbuffered: a failed write would stay in a buffer and fail again
            self.stream = FileIO(file, "a")
        self.file = file
        self.recent: list[dict[str, float]] = []

    def add(self, step: int, values: dict[str, float]) -> None:
        """Write one step's values; they are in the file when this returns. Raises OutputError."""
        line = (json.dumps({"step": step, **values}) + "\n").encode()
        with writing(self.file):
            while line:
                line = line[self.stream.write(line) :]
        self.recent.append(values)

    def recent_means(self) -> dict[str, float]:
        """Mean of each value over the steps that had it since the last call."""
        recent, self.recent = self.recent, []
        return means_of(recent)

    def close(self) -> None:
        """Close the file."""
        self.stream.close()


def read_records(file: Path) -> list[dict[str, float]]:
    """All records, step by step; none if there is no file."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def means_of(records: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each value over the records that have it, in the order in which they appear."""
    columns: dict[str, list[float]] = {}
    for record in records:
        for name, value in record.items():
            columns.setdefault(name, []).append(value)
    return {name: math.fsum(column) / len(column) for name, column in columns.items()}


def find_trackers(report_to: str) -> list[str]:
    """The trackers of the option report_to. Raises ConfigError if one is not installed."""
    names = {"none": [], "all": list(TRACKERS)}.get(report_to, [report_to])
    if missing := [name for name in names if importlib.util.find_spec(name) is None]:
        raise ConfigError(
            f"report_to={report_to} needs {' and '.join(missing)}; "
            "install with `pip install 'stablesr-kit[trackers]'`, or take another of "
            f"{', '.join(['none', *TRACKERS])}"
        )
    return names


def start_trackers(accelerator: Accelerator, config: RunConfig, step: int) -> None:
    """Start the trackers, or resume them after a step; their values of later steps are replaced.

    Raises ConfigError if a tracker cannot start.
    """
    folder = Path(config.output_dir) / "logs"
    own: dict[str, dict[str, Any]] = {"tensorboard": {"purge_step": step + 1 if step else 0}}
    if "wandb" in find_trackers(config.report_to) and accelerator.is_main_process:
        name = Path(config.output_dir).name
        own["wandb"] = {"id": _wandb_id(folder, step), "resume": "allow", "name": name, "dir": str(folder)}
    options = {name: _plain(value) for name, value in dataclasses.asdict(config).items()} if step == 0 else None
    try:
        accelerator.init_trackers(config.tracker_project_name, options, own)
    except Exception as error:  # trackers raise classes of their own, for instance if nobody is logged in
        raise ConfigError(
            f"report_to={config.report_to} cannot start: {error}; "
            "log in (`wandb login`), set WANDB_MODE=offline, or use report_to=tensorboard"
        ) from error


def show_pictures(accelerator: Accelerator, pictures: dict[str, np.ndarray], step: int) -> None:
    """Send pictures (H, W, 3) uint8, by name, to every tracker; for the main process."""
    for tracker in accelerator.trackers:
        for name, pixels in pictures.items():
            kwargs = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({name: pixels[None]}, step=step, **kwargs)


def _wandb_id(folder: Path, step: int) -> str:
    """The id of the run; a resumed run keeps its id."""
    file = folder / "wandb_id"
    if step > 0 and file.exists():
        return file.read_text().strip()
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(uuid.uuid4().hex[:8] + "\n")
    return file.read_text().strip()


def _plain(value: Any) -> int | float | str:
    """The value for a table of hyperparameters, which holds numbers and strings."""
    return value if isinstance(value, int | float | str) else str(value)


DATA = ("train_data_dir", "lq_data_dir", "dataset_name", "shards", "latents", "samples", "pairs")
"""Options that name training data."""


def model_card(
    config: RunConfig, results: dict[str, str], *, processes: int, samples: int, seconds: float
) -> ModelCard:
    """The model card of a finished run, from its options and the records in its output_dir.

    results: folder of each result -> class. processes: number in the last call. samples: per step. seconds: total of
    all calls.
    """
    program, folder = Path(sys.argv[0]).stem, Path(config.output_dir)
    options = dataclasses.asdict(config)
    origins = {name: value for name, value in options.items() if name.startswith("pretrained_") and value is not None}
    data = {name: options[name] for name in DATA if options.get(name)}
    metadata = ModelCardData(library_name="diffusers", pipeline_tag="image-to-image", tags=["stablesr-kit", program])
    last = read_records(folder / "losses.jsonl")[-config.logging_steps :]
    paragraphs = [
        f"---\n{metadata.to_yaml()}\n---",
        f"# {folder.resolve().name}",
        f"Trained by `{program}` of stablesr-kit {__version__}. "
        "The licences of the data and of the weights it started from apply.",
        _table(["folder", "class"], results.items()),
        f"Started from {_listed(origins) or 'nothing'}; trained on {_listed(data) or 'data that no option names'}.",
        f"{config.max_train_steps} steps of {samples} samples in {seconds:.0f} s, at the end with {processes} "
        f"process{'es' if processes > 1 else ''}:",
        f"    accelerate launch {shlex.join(sys.argv)}",
        f"## Losses\n\nMeans over the last {len(last)} steps; losses.jsonl has every step.",
        _table(["loss", "mean"], (item for item in means_of(last).items() if item[0] not in ("step", "learning_rate"))),
    ]
    if validations := read_records(folder / "validation" / "metrics.jsonl"):
        names = [name for name in validations[-1] if "/" not in name]  # names with a slash are of single pictures
        rows = [[line.get(name, "") for name in names] for line in validations]
        paragraphs += ["## Validation\n\nMeans over the pictures in the folder validation.", _table(names, rows)]
    paragraphs.append(f"## Options\n\n```yaml\n{yaml.safe_dump(options, sort_keys=False)}```")
    return ModelCard("\n\n".join(paragraphs) + "\n")


def _listed(options: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} `{' '.join(value) if isinstance(value, tuple) else value}`" for name, value in options.items()
    )


def _table(head: list[str], rows: Any) -> str:
    """A Markdown table; numbers have five digits."""
    lines = [head, ["---"] * len(head), *rows]
    cells = [[f"{cell:.5g}" if isinstance(cell, float) else str(cell) for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


LEFT_OUT = ("checkpoint-*", "diverged-*", "logs/wandb*", ".*")
"""Files that are not uploaded: checkpoints, which only this run resumes from, and files that are half written."""


def open_repository(config: RunConfig) -> str:
    """OWNER/NAME of the repository for the results; it is created if it does not exist.

    Raises ConfigError if nobody is logged in, or the hub cannot be reached or refuses.
    """
    api = HfApi()
    try:
        api.whoami()
        name = config.hub_model_id or Path(config.output_dir).resolve().name
        return api.create_repo(name, private=config.hub_private, exist_ok=True).repo_id
    except LocalTokenNotFoundError as error:
        raise ConfigError(
            "push_to_hub needs a login to the Hugging Face hub; run `hf auth login`, set HF_TOKEN, or leave it out"
        ) from error
    except Exception as error:  # the client and the libraries below it raise many classes
        raise ConfigError(
            f"push_to_hub cannot make the repository at {api.endpoint}: {error}; "
            "check the connection, the login and hub_model_id, or leave push_to_hub out"
        ) from error


def upload(output_dir: Path, repository: str, message: str) -> str:
    """Upload results, model card and records; returns the address of the commit.

    Raises OutputError if that fails; everything is still in output_dir.
    """
    try:
        commit = HfApi().upload_folder(
            repo_id=repository, folder_path=output_dir, commit_message=message, ignore_patterns=list(LEFT_OUT)
        )
    except Exception as error:  # as above
        raise OutputError(
            f"{output_dir} is finished, but cannot be uploaded to {repository}: {error}; "
            f"upload it with `hf upload {repository} {output_dir}`"
        ) from error
    return str(commit.commit_url)
