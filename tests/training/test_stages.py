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

from stablesr_kit.errors import ConfigError
from stablesr_kit.training.run.stages import BegunStage, Stage, find_continuation, put_away, read_journal, write_journal
from tests.helpers.training_runs import ROOT

STAGES = [
    "train_autoencoder configs/tiny/autoencoder.yaml --max_train_steps 24 --checkpointing_steps 4",
    "run_stages inner.yaml",  # a program that needs no second to start
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "photos").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (80, 96, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "photos" / "noise.png")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "inner.yaml").write_text("output_dir: inner\nstages: []\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRAIN_DATA", str(tmp_path / "photos"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def start(*stages: str) -> subprocess.Popen[str]:
    call = [sys.executable, str(ROOT / "training" / "run_stages.py"), "--output_dir", "runs/tiny"]
    call += ["--stages", json.dumps(stages)]
    return subprocess.Popen(call, stderr=subprocess.PIPE, text=True, start_new_session=True)


def test_interrupted_stages_resume_finished_ones_are_skipped_and_changed_ones_begin_anew(folder: Path) -> None:
    run = start(*STAGES)
    while not (folder / "runs/tiny/autoencoder/checkpoint-4").exists():
        assert run.poll() is None, run.communicate()[1]
        time.sleep(0.01)
    os.killpg(run.pid, 9)
    run.communicate()

    run = start(*STAGES)
    _, log = run.communicate(timeout=240)
    assert run.returncode == 0, log
    assert "resumed runs/tiny/autoencoder/checkpoint-" in log and "begins anew" not in log
    journal = read_journal(folder / "runs/tiny/stages.json")
    assert [begun.stage.program for begun in journal] == ["train_autoencoder", "run_stages"]
    assert journal[1].stage.options["stages"] == [] and journal[1].seconds
    assert read_journal(folder / "inner/stages.json") == []

    (folder / "inner/stages.json").unlink()
    run = start(STAGES[0], STAGES[1] + " --seed 3")
    _, log = run.communicate(timeout=60)
    assert run.returncode == 0
    assert f"{STAGES[0]}: skipped, it was finished with the same options" in log
    assert f"{STAGES[1]} --seed 3: begins anew, since seed is 3, was None" in log
    assert (folder / "inner/stages.json").exists()


def stage(program: str, output_dir: str, **options: int) -> Stage:
    return Stage.of(program, {"output_dir": output_dir, **options})


CHAIN = [
    stage("train_prior", "prior"),
    stage("generate_cfw_data", "data"),
    stage("train_cfw", "cfw", max_train_steps=10),
    stage("train_cfw", "cfw", max_train_steps=20),
    stage("assemble_pipeline", "pipeline"),
]
DONE = [BegunStage(stage=stage, seconds=1.0) for stage in CHAIN]


def test_what_is_unchanged_is_kept_and_new_stages_are_appended() -> None:
    assert find_continuation(CHAIN, []) == ([], {}, [])
    assert find_continuation(CHAIN, DONE[:2]) == (DONE[:2], {}, [])
    assert find_continuation(CHAIN, DONE) == (DONE, {}, [])
    assert find_continuation(CHAIN[:4], DONE) == (DONE[:4], {}, [])


def test_a_changed_stage_and_all_after_it_begin_anew() -> None:
    chain = [*CHAIN[:1], stage("generate_cfw_data", "data", crops=9), *CHAIN[2:]]
    kept, reasons, outdated = find_continuation(chain, DONE)
    assert kept == DONE[:1]
    assert reasons == {1: "crops is 9, was None", **{i: "stage 2 does" for i in (2, 3, 4)}}
    assert outdated == [Path("cfw")]


def test_stages_that_train_on_from_each_other_begin_anew_together() -> None:
    chain = [*CHAIN[:3], stage("train_cfw", "cfw", max_train_steps=30), CHAIN[4]]
    kept, reasons, outdated = find_continuation(chain, DONE)
    assert kept == DONE[:2]
    assert reasons == {
        2: "stage 4 does, which goes on from checkpoints of the same output_dir",
        3: "max_train_steps is 30, was 20",
        4: "stage 3 does",
    }
    assert outdated == [Path("cfw")]


def test_what_was_trained_with_other_options_is_put_away_and_not_deleted(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / "cfw").mkdir()
        assert put_away(tmp_path / "cfw") == tmp_path / f"cfw.old-{number}"
    assert not (tmp_path / "cfw").exists()


def test_a_journal_is_read_as_it_was_written_and_another_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "stages.json"
    assert read_journal(file) == []
    write_journal(file, DONE)
    assert read_journal(file) == DONE
    file.write_text('{"train_prior configs/prior.yaml": 3.0}')
    with pytest.raises(ConfigError, match=r"stages\.json is no journal of stages; delete it"):
        read_journal(file)


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
