"""The stages of mini run by one command, which goes on where it was interrupted."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.training_runs import ROOT

STAGES = [
    "train_autoencoder configs/tiny/autoencoder.yaml --max_train_steps 400 --checkpointing_steps 2",
    "cache_latents configs/tiny/latents.yaml",
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "photos").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (80, 96, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "photos" / "noise.png")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRAIN_DATA", str(tmp_path / "photos"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def start(*stages: str) -> subprocess.Popen[str]:
    call = [sys.executable, str(ROOT / "training" / "run_stages.py"), "--output_dir", "runs/tiny"]
    call += ["--stages", json.dumps(stages)]
    return subprocess.Popen(call, stderr=subprocess.PIPE, text=True, start_new_session=True)


def test_interrupted_stages_resume_and_finished_ones_are_passed_over(folder: Path) -> None:
    run = start(*STAGES)
    while not (folder / "runs/tiny/autoencoder/checkpoint-4").exists():
        assert run.poll() is None, run.communicate()[1]
        time.sleep(0.01)
    os.killpg(run.pid, 9)
    run.communicate()
    assert not (folder / "runs/tiny/stages.json").exists()

    # the killed run's steps are far fewer than the first call asked for, so that the rest is short
    run = start(STAGES[0].replace("400", "12"), STAGES[1])
    _, log = run.communicate(timeout=240)
    assert run.returncode == 0, log
    assert "resumed runs/tiny/autoencoder/checkpoint-" in log
    assert len(json.loads((folder / "runs/tiny/stages.json").read_text())) == 2
    written = (folder / "runs/tiny/latents/latents.safetensors").stat().st_mtime_ns

    run = start(STAGES[0].replace("400", "12"), STAGES[1])
    _, log = run.communicate(timeout=60)
    assert run.returncode == 0
    assert log.count("finished before") == 2
    assert (folder / "runs/tiny/latents/latents.safetensors").stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("stage", "message"),
    [("train_nothing configs/tiny/latents.yaml", "does not exist"), ("cache_latents", "is no file")],
)
def test_a_stage_that_cannot_run_is_refused_before_any_is_started(folder: Path, stage: str, message: str) -> None:
    run = start(STAGES[0], stage)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 2
    assert message in errors and errors.count("\n") == 1
    assert not (folder / "runs").exists()


@pytest.mark.usefixtures("folder")
def test_a_missing_folder_of_photographs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRAIN_DATA")
    run = start(STAGES[0])
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 2
    assert "TRAIN_DATA=FOLDER" in errors
