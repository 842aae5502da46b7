"""What every tiny program has trained, computed once for all tests that begin with it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.training_runs import FACES, run_programs, tiny, working_folder

Once = Callable[[str, Callable[[Path], None]], Path]
"""The type of the fixture `once`."""


@pytest.fixture(scope="session")
def photo_runs(once: Once) -> Path:
    """Folder of the results of the programs for photographs, one after the other as for mini."""
    return once("photo_runs", _run_programs_for_photos) / "runs"


@pytest.fixture(scope="session")
def face_runs(once: Once) -> Path:
    """Folder of the results of the programs for faces."""
    return once("face_runs", _run_programs_for_faces) / "runs"


def _run_programs_for_photos(folder: Path) -> None:
    with working_folder(folder, "TRAIN_DATA"):
        run_programs(
            [
                tiny("train_autoencoder", "autoencoder"),
                tiny("train_decoder", "decoder"),
                tiny("cache_latents", "latents"),
                tiny("train_prior", "prior"),
                tiny("train_stablesr", "stablesr"),
                tiny("assemble_pipeline", "pipeline"),
                tiny("generate_cfw_data", "cfw_data"),
                tiny("train_cfw", "cfw"),
                tiny("assemble_pipeline", "pipeline", "--pretrained_cfw", "runs/tiny/cfw/cfw"),
                tiny("cache_pairs", "pairs"),
                tiny("train_few_step", "few_step"),
            ]
        )


def _run_programs_for_faces(folder: Path) -> None:
    with working_folder(folder, "TRAIN_FACES", **FACES):
        run_programs(
            [
                tiny("start_vqgan", "start_vqgan"),
                tiny("train_vqgan", "vqgan"),
                tiny("train_codeformer", "codeformer_stage2"),
                tiny("train_codeformer", "codeformer_stage3"),
                tiny("generate_codes", "codes"),
            ]
        )
