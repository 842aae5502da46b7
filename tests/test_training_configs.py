"""Every file of configs/ holds the options of its program, and opens with the command that uses it."""

import runpy
import shlex
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from stablesr_kit.training.config import ProgramConfig, load_config
from tests.training_runs import ROOT

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
        assert command[1:3] == ["make", "mini"]
        program, flags = "training/run_stages.py", ["--config", str(file)]
    else:
        program = next(word for word in command if word.startswith("training/"))
        flags = command[command.index(program) + 1 :]
    assert flags[:2] == ["--config", str(file)]
    monkeypatch.chdir(ROOT)
    names = runpy.run_path(str(ROOT / program), run_name="options")
    own = [kind for kind in names.values() if isinstance(kind, type) and issubclass(kind, ProgramConfig)]
    (kind,) = [kind for kind in own if kind.__module__ == "options"]
    config = load_config(kind, flags)
    assert config.output_dir.startswith("runs/")


@pytest.mark.parametrize("file", ACCELERATE_CONFIGS, ids=str)
def test_accelerate_reads_its_configs(file: Path) -> None:
    assert command_of(file)[:4] == ["accelerate", "launch", "--config_file", str(file)]
    config = load_config_from_file(str(ROOT / file))
    assert config.num_processes >= config.num_machines >= 1
