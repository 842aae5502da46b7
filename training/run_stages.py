"""Run programs one after the other, and go on where the last call was interrupted.

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
    """Commands in their order, each the name of a program in training/, its config, and flags if any."""
    accelerate_config: str | None = None
    """File for `accelerate launch` of the stages that train (train_*); None runs them in one process."""


def main(config: StagesConfig) -> None:
    """Run every stage that is not finished, as output_dir/stages.json has it with its options and seconds.

    A stage that was interrupted is called again, and resumes by itself if it trains. One whose options were changed
    since begins anew, and all that come after it; what they had trained is put away under another name. Raises
    ConfigError for a stage that is no program or has no config, StableSRKitError when one fails.
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
    """The stage's program and options. Raises ConfigError if it cannot be called: before hours are spent on others."""
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
