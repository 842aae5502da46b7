"""What every tiny program has trained, computed once for all tests that begin with it."""

from pathlib import Path

import pytest

from tests.helpers.training_runs import FACES, run_programs, tiny, working_folder


@pytest.fixture(scope="session")
def photo_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the results of the programs for photographs, one after the other as for mini."""
    with working_folder(tmp_path_factory.mktemp("photo_runs"), "TRAIN_DATA") as folder:
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
        return folder / "runs"


@pytest.fixture(scope="session")
def face_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the results of the programs for faces."""
    with working_folder(tmp_path_factory.mktemp("face_runs"), "TRAIN_FACES", **FACES) as folder:
        run_programs(
            [
                tiny("start_vqgan", "start_vqgan"),
                tiny("train_vqgan", "vqgan"),
                tiny("train_codeformer", "codeformer_stage2"),
                tiny("train_codeformer", "codeformer_stage3"),
                tiny("generate_codes", "codes"),
            ]
        )
        return folder / "runs"
