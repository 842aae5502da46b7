"""Run programs one after the other; continue where the last call was interrupted.

TRAIN_DATA=PHOTOS python training/run_stages.py --config configs/mini/stages.yaml
"""

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
from stablesr_kit.training.run.command_line import given_options, launch
from stablesr_kit.training.run.config import ProgramConfig
from stablesr_kit.training.run.stages import BegunStage, Stage, find_continuation, put_away, read_journal, write_journal

logger = logging.getLogger("run_stages")


@dataclass(frozen=True, kw_only=True)
class StagesConfig(ProgramConfig):
    """Options of this program."""

    stages: tuple[str, ...]
    """Commands in order: the name of a program in training/, its config, and flags if any."""
    accelerate_config: str | None = None
    """Config file of `accelerate launch`, for the stages that train (train_*); None runs them in one process."""


def main(config: StagesConfig) -> None:
    """Run every stage that output_dir/stages.json does not record as finished with the same options.

    A stage that was interrupted is run again, and resumes by itself if it trains. If the options of a stage have
    changed, it and all later stages start again; what they had trained is kept under another name. Raises ConfigError
    for an unknown program or a missing config, StableSRKitError if a stage fails.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    stages = [read(stage) for stage in config.stages]
    journal = Path(config.output_dir) / "stages.json"
    journal.parent.mkdir(parents=True, exist_ok=True)
    continuation = find_continuation(stages, read_journal(journal))
    for folder in continuation.outdated:
        if folder.exists():
            logger.info("%s was trained with other options, and is now %s", folder, put_away(folder))
    records = continuation.kept
    write_journal(journal, records)
    for i, stage in enumerate(stages):
        name = f"stage {i + 1} of {len(stages)}, {config.stages[i]}"
        if i < len(records) and (seconds := records[i].seconds) is not None:
            logger.info("%s: skipped, it was finished with the same options (%.0f s)", name, seconds)
            continue
        reason = f": begins anew, since {continuation.reasons[i]}" if i in continuation.reasons else ""
        logger.info("%s%s", name, reason)
        records[i:] = [BegunStage(stage=stage, seconds=None)]
        write_journal(journal, records)
        start = time.monotonic()
        status = subprocess.run(command(config.stages[i], config)).returncode
        if status != 0:
            raise StableSRKitError(f"{name}: ended with status {status}; the same command goes on from there")
        records[i] = BegunStage(stage=stage, seconds=round(time.monotonic() - start, 1))
        write_journal(journal, records)


def read(stage: str) -> Stage:
    """The program and options of a stage. Raises ConfigError if it cannot run, before hours are spent on others."""
    words = shlex.split(stage)
    program, file = [*words, "", ""][:2]
    if not program_file(program).is_file():
        raise ConfigError(f"stage {stage!r}: {program_file(program)} does not exist; begin with a name from training/")
    if not Path(file).is_file():
        raise ConfigError(f"stage {stage!r}: {file!r} is no file; give the program's config after its name")
    for variable in re.findall(r"\$(\w+)", Path(file).read_text()):
        if variable not in os.environ:
            raise ConfigError(f"{file} asks for {variable}; set it, as in {variable}=FOLDER before the command")
    return Stage.of(program, given_options(["--config", file, *words[2:]]))


def command(stage: str, config: StagesConfig) -> list[str]:
    """The command that runs the stage."""
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
