"""Checkpoint folders of a run: they appear whole or not at all, and a run goes on from the newest whole one."""

import json
import logging
import re
import shutil
from pathlib import Path

from stablesr_kit.errors import ConfigError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
"""Written last into a checkpoint: its step, the seconds it took, and the size of every file."""

UNFINISHED = ".unfinished"
"""Suffix of what is still being written."""


def checkpoint_folder(output_dir: Path, step: int) -> Path:
    """Folder of the checkpoint after so many steps."""
    return output_dir / f"checkpoint-{step}"


def publish(unfinished: Path, final: Path, step: int, seconds: float) -> None:
    """Give a folder that is completely written its manifest and its final name, in place of what has that name.

    step, seconds: how many are behind the run.
    """
    files = sorted(path for path in unfinished.rglob("*") if path.is_file())
    sizes = {str(path.relative_to(unfinished)): path.stat().st_size for path in files}
    (unfinished / MANIFEST).write_text(json.dumps({"step": step, "seconds": seconds, "files": sizes}, indent=1) + "\n")
    shutil.rmtree(final, ignore_errors=True)
    unfinished.rename(final)


def prune(output_dir: Path, keep: int) -> None:
    """Delete the oldest whole checkpoints beyond `keep`."""
    for folder in whole_checkpoints(output_dir)[:-keep]:
        shutil.rmtree(folder)


def whole_checkpoints(output_dir: Path) -> list[Path]:
    """Folders output_dir/checkpoint-STEP that hold everything their manifest names, oldest first."""
    folders = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((folder for folder in folders if is_whole(folder)), key=step_of)


def is_whole(folder: Path) -> bool:
    """Whether every file that the manifest names is there at its full size."""
    try:
        sizes = json.loads((folder / MANIFEST).read_text())["files"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def step_of(folder: Path) -> int:
    """Number of steps behind a checkpoint, from its name."""
    return int(folder.name.rpartition("-")[2])


def seconds_of(folder: Path) -> float:
    """Seconds that the run had taken up to a whole checkpoint."""
    return float(json.loads((folder / MANIFEST).read_text()).get("seconds", 0.0))


def find_checkpoint(output_dir: Path, choice: str | None) -> Path | None:
    """The checkpoint to resume from, None to start afresh.

    choice: None, a folder, or "latest": the newest whole one of output_dir; what was cut off while it was written is
    named in the log. Raises ConfigError for a folder that is not a whole checkpoint.
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
