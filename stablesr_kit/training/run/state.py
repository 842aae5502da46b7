"""Checkpoint folders of a run: they appear whole or not at all, and a run resumes from the newest complete one."""

import dataclasses
import json
import logging
import re
import shutil
from contextlib import AbstractContextManager
from pathlib import Path

import yaml

from stablesr_kit import storage
from stablesr_kit.errors import ConfigError
from stablesr_kit.training.run.config import RunConfig

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
"""The last file of a checkpoint: its step, the seconds of the run so far, and the size of every file."""

OPTIONS = "config.yaml"
"""Options of the run that wrote a checkpoint."""

RESUMES = "free space or choose another place; the same command then goes on from the last whole checkpoint"
"""Advice if a file of a run cannot be written."""


def writing(path: Path) -> AbstractContextManager[None]:
    """Context that turns errors of writing `path` into OutputError."""
    return storage.writing(path, RESUMES)


def checkpoint_folder(output_dir: Path, step: int) -> Path:
    """Folder of the checkpoint of a step."""
    return output_dir / f"checkpoint-{step}"


def publish(part: Path, folder: Path, step: int, seconds: float) -> None:
    """Add the manifest to a completely written checkpoint, and give it its final name, replacing an older folder.

    step, seconds: of the run so far. Raises OutputError.
    """
    files = sorted(path for path in part.rglob("*") if path.is_file())
    sizes = {str(path.relative_to(part)): path.stat().st_size for path in files}
    (part / MANIFEST).write_text(json.dumps({"step": step, "seconds": seconds, "files": sizes}, indent=1) + "\n")
    storage.publish(part, folder)


def prune(output_dir: Path, keep: int) -> None:
    """Delete all but the newest `keep` complete checkpoints."""
    for folder in whole_checkpoints(output_dir)[:-keep]:
        shutil.rmtree(folder)


def whole_checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints output_dir/checkpoint-STEP, oldest first."""
    folders = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((folder for folder in folders if is_whole(folder)), key=step_of)


def is_whole(folder: Path) -> bool:
    """Whether every file of the manifest exists and has its full size."""
    try:
        sizes = json.loads((folder / MANIFEST).read_text())["files"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def step_of(folder: Path) -> int:
    """Step of a checkpoint, from its name."""
    return int(folder.name.rpartition("-")[2])


def seconds_of(folder: Path) -> float:
    """Seconds of the run up to a complete checkpoint."""
    return float(json.loads((folder / MANIFEST).read_text()).get("seconds", 0.0))


def find_checkpoint(output_dir: Path, choice: str | None) -> Path | None:
    """The checkpoint to resume from; None starts from the beginning.

    choice: None, a folder, or "latest": the newest complete one in output_dir; incomplete ones are logged. Raises
    ConfigError for a folder that is no complete checkpoint.
    """
    if choice is None:
        return None
    if choice == "latest":
        whole = whole_checkpoints(output_dir)
        for folder in sorted(output_dir.glob("checkpoint-*")):
            if folder not in whole:
                logger.warning("%s was cut off while it was written and is ignored", folder)
        return whole[-1] if whole else None
    folder = Path(choice)
    if not re.fullmatch(r"checkpoint-\d+", folder.name) or not is_whole(folder):
        raise ConfigError(
            f"resume_from_checkpoint={choice} is no whole checkpoint; give latest, null, or a checkpoint-STEP folder"
        )
    return folder


def changed_options(config: RunConfig, file: Path) -> list[str]:
    """Differences between the options and those of a checkpoint, one text each; none if it has no options.

    output_dir and resume_from_checkpoint are not compared.
    """
    if not file.exists():
        return []
    before = yaml.safe_load(file.read_text())
    now = yaml.safe_load(yaml.safe_dump(dataclasses.asdict(config)))
    names = [name for name in now if name not in ("output_dir", "resume_from_checkpoint")]
    return [f"{name} is {now[name]}, was {before.get(name)}" for name in names if now[name] != before.get(name)]
