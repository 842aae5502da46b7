"""Run programs one after the other, and go on where the last call was interrupted.

TRAIN_DATA=PHOTOS python training/run_stages.py --config configs/mini/stages.yaml
"""

import json
import logging
import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from stablesr_kit.errors import ConfigError, StableSRKitError
from stablesr_kit.training.config import ProgramConfig
from stablesr_kit.training.program import launch

logger = logging.getLogger("run_stages")


@dataclass(frozen=True, kw_only=True)
class StagesConfig(ProgramConfig):
    """Options of this program."""

    stages: tuple[str, ...]
    """Commands in their order, each the name of a program in training/, its config, and flags if any."""
    accelerate_config: str | None = None
    """File for `accelerate launch` of the stages that train (train_*); None runs them in one process."""


def main(config: StagesConfig) -> None:
    """Run every stage that is not finished; output_dir/stages.json names those that are, with their seconds.

    A stage that was interrupted is called again, and resumes by itself if it trains. Raises ConfigError for a stage
    that is no program or has no config, StableSRKitError when one fails.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    for stage in config.stages:
        check(stage)
    journal = Path(config.output_dir) / "stages.json"
    journal.parent.mkdir(parents=True, exist_ok=True)
    finished: dict[str, float] = json.loads(journal.read_text()) if journal.exists() else {}
    for number, stage in enumerate(config.stages, 1):
        name = f"stage {number} of {len(config.stages)}, {stage}"
        if stage in finished:
            logger.info("%s: finished before", name)
            continue
        logger.info("%s", name)
        start = time.monotonic()
        status = subprocess.run(command(stage, config)).returncode
        if status != 0:
            raise StableSRKitError(f"{name}: ended with status {status}; the same command goes on from there")
        finished[stage] = round(time.monotonic() - start, 1)
        beside = journal.with_name(journal.name + ".unfinished")
        beside.write_text(json.dumps(finished, indent=1) + "\n")
        beside.rename(journal)


def check(stage: str) -> None:
    """Whether the stage can be called at all, before hours are spent on the ones before it."""
    program, file, *_ = [*shlex.split(stage), "", ""]
    if not program_file(program).is_file():
        raise ConfigError(f"stage {stage!r}: {program_file(program)} does not exist; begin with a name from training/")
    if not Path(file).is_file():
        raise ConfigError(f"stage {stage!r}: {file!r} is no file; give the program's config after its name")
    for variable in re.findall(r"\$(\w+)", Path(file).read_text()):
        if variable not in os.environ:
            raise ConfigError(f"{file} asks for {variable}; set it, as in {variable}=FOLDER before the command")


def command(stage: str, config: StagesConfig) -> list[str]:
    """What starts the stage."""
    program, file, *flags = shlex.split(stage)
    launcher = [sys.executable]
    if config.accelerate_config is not None and program.startswith("train_"):
        launcher += ["-m", "accelerate.commands.launch", "--config_file", config.accelerate_config]
    return [*launcher, str(program_file(program)), "--config", file, *flags]


def program_file(program: str) -> Path:
    """File of a program beside this one."""
    return Path(__file__).with_name(f"{program}.py")


if __name__ == "__main__":
    launch(main, StagesConfig)
