"""A program takes the options it uses, and no others."""

import importlib.util
import json
import re
import runpy
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from stablesr_kit.errors import ConfigError
from stablesr_kit.training.losses.denoising import DenoisingOptions, enable_xformers
from stablesr_kit.training.run.command_line import load_config
from stablesr_kit.training.run.config import ProgramConfig, RunConfig
from stablesr_kit.training.run.run import TrainingRun
from stablesr_kit.training.small import build_small_unet
from tests.helpers.forks import of_two_processes
from tests.helpers.photo_files import save_photos
from tests.helpers.training_runs import ENDLESS_S, ROOT, run_program, tiny

PROGRAMS = sorted(file.stem for file in (ROOT / "training").glob("*.py"))

UNUSED = {
    "train_autoencoder": ("use_usm", "lq_data_dir", "degradations", "pair_queue_size"),
    "train_decoder": ("no_degradation_prob",),
    "train_vqgan": ("conditioning_image_column",),
    "train_codeformer": ("lq_data_dir", "pair_queue_size"),
    "cache_latents": ("pair_queue_size",),
    "generate_cfw_data": ("pair_queue_size",),
}
"""Options of photographs that a program has no use for."""


def options_of(program: str) -> type[ProgramConfig]:
    names = runpy.run_path(str(ROOT / "training" / f"{program}.py"), run_name="options")
    own = [kind for kind in names.values() if isinstance(kind, type) and issubclass(kind, ProgramConfig)]
    (kind,) = [kind for kind in own if kind.__module__ == "options"]
    return kind


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_describes_every_option(
    program: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit, match="0"):
        run_program(program, "--help")
    _, *parts = re.split(r"^  --(\w+)", capsys.readouterr().out, flags=re.MULTILINE)
    told = {name: " ".join(text.split()) for name, text in zip(parts[::2], parts[1::2], strict=True)}
    assert set(told) == {"config", *(field.name for field in fields(options_of(program)))}
    for name, text in told.items():
        assert re.match(r"\S+ [A-Z].*[a-z].*\((type|default|required)", text), (
            name,
            text,
        )  # a value, a sentence, a type


def test_help_shows_the_values_of_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        run_program(*tiny("train_prior", "prior", "--help"))
    told = " ".join(capsys.readouterr().out.split())
    assert "null builds an untrained one. (type: str | null, default: null)" in told
    assert "Widths of an untrained UNet. (type: tuple[int, ...] | int, default: (16, 32, 32))" in told


@pytest.mark.parametrize("program", UNUSED)
def test_an_option_that_would_be_ignored_is_refused(program: str) -> None:
    kind = options_of(program)
    for option in UNUSED[program]:
        with pytest.raises(ConfigError, match=f"unknown option '{option}'; did you mean"):
            load_config(kind, [f"--{option}", "1"])


def test_the_pair_queue_is_refused_for_pairs_as_they_come(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(save_photos(tmp_path / "photos", 2))
    flags = ["--train_data_dir", folder, "--lq_data_dir", folder, "--resolution", "16", "--pair_queue_size", "4"]
    networks = ["--pretrained_unet", "none", "--pretrained_vae", "none", "--max_train_steps", "1"]
    with pytest.raises(SystemExit, match="2"):
        run_program("train_stablesr", *flags, *networks, "--output_dir", str(tmp_path / "run"))
    assert "pair_queue_size is for photographs that are degraded on the fly" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("xformers") is not None, reason="xformers is installed")
def test_xformers_that_is_missing_is_one_line() -> None:
    options = DenoisingOptions(enable_xformers_memory_efficient_attention=True)
    with pytest.raises(ConfigError, match=r"stablesr-kit\[xformers\]") as error:
        enable_xformers(options, build_small_unet((16, 32)))
    assert "\n" not in str(error.value)
    enable_xformers(DenoisingOptions(), build_small_unet((16, 32)))


def test_tf32_is_allowed_where_it_is_asked_for(tmp_path: Path) -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    for is_allowed in (False, True):
        AcceleratorState._reset_state(reset_partial_state=True)
        TrainingRun(RunConfig(output_dir=str(tmp_path), max_train_steps=1, allow_tf32=is_allowed))
        assert torch.backends.cuda.matmul.allow_tf32 is (is_allowed or before)
    torch.backends.cuda.matmul.allow_tf32 = before


def test_accelerate_tells_two_processes_what_forked_ones_are_told_here(tmp_path: Path) -> None:
    """Starting the programs themselves so would take three imports of torch."""
    script = tmp_path / "told.py"
    script.write_text("import json, os\nopen(f\"told{os.environ['RANK']}\", 'w').write(json.dumps(dict(os.environ)))\n")
    config = ROOT / "configs" / "accelerate" / "cpu_2_processes.yaml"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), str(script)]
    subprocess.run(launch, cwd=tmp_path, check=True, capture_output=True, timeout=ENDLESS_S)
    for rank in range(2):
        told = json.loads((tmp_path / f"told{rank}").read_text())
        forked = of_two_processes(rank, int(told["MASTER_PORT"]))
        assert told.items() >= forked.items(), {name: told.get(name) for name in forked}
