"""Every file of configs/ holds the options of its program, and opens with the command that uses it."""

import runpy
import shlex
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from benchmarks.training import SIZES, call_of
from stablesr_kit.training.run.command_line import load_config
from stablesr_kit.training.run.config import ProgramConfig, RunConfig
from tests.helpers.training_runs import ROOT

FILES = sorted(path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.yaml"))
PROGRAM_CONFIGS = [file for file in FILES if file.parent.name != "accelerate"]
ACCELERATE_CONFIGS = [file for file in FILES if file.parent.name == "accelerate"]


def command_of(file: Path) -> list[str]:
    """Words of the command in the first lines of a file, up to the first that is empty."""
    words = ""
    for line in (ROOT / file).read_text().splitlines():
        line = line.removeprefix("#").strip()
        if not line:
            break
        words += line.removesuffix("\\") + " "
    return shlex.split(words)


@pytest.mark.parametrize("file", PROGRAM_CONFIGS, ids=str)
def test_a_config_holds_the_options_of_the_program_in_its_first_lines(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = command_of(file)
    if file.name == "stages.yaml":
        assert command[command.index("make") + 1] == "mini"
        program, flags = "training/run_stages.py", ["--config", str(file)]
    else:
        program = next(word for word in command if word.startswith("training/"))
        flags = command[command.index(program) + 1 :]
    assert flags[:2] == ["--config", str(file)]
    monkeypatch.chdir(ROOT)
    config = load_config(options_of(program), flags)
    assert config.output_dir.startswith("runs/")


def options_of(program: str) -> type[ProgramConfig]:
    """The class of a program's options."""
    names = runpy.run_path(str(ROOT / program), run_name="options")
    own = [kind for kind in names.values() if isinstance(kind, type) and issubclass(kind, ProgramConfig)]
    (kind,) = [kind for kind in own if kind.__module__ == "options"]
    return kind


@pytest.mark.parametrize(("size", "stage"), [(size, stage) for size, stages in SIZES.items() for stage in stages])
def test_the_benchmark_calls_programs_with_options_they_have(size: str, stage: str, tmp_path: Path) -> None:
    program, *flags = call_of(SIZES[size][stage], tmp_path, steps=3, use_checkpointing=True)
    config = load_config(options_of(f"training/{program}.py"), flags)
    assert isinstance(config, RunConfig)
    assert config.gradient_checkpointing and config.max_train_steps == 3


@pytest.mark.parametrize("file", ACCELERATE_CONFIGS, ids=str)
def test_accelerate_reads_its_configs(file: Path) -> None:
    assert command_of(file)[:4] == ["accelerate", "launch", "--config_file", str(file)]
    config = load_config_from_file(str(ROOT / file))
    assert config.num_processes >= config.num_machines >= 1
