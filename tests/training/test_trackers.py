"""A run is watched with TensorBoard or Weights & Biases, which see one run however often it is resumed."""

import importlib.util
import json
import sys
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from stablesr_kit.errors import ConfigError
from stablesr_kit.training.run.reporting import find_trackers
from tests.helpers.photo_files import save_photos
from tests.helpers.training_runs import ROOT, run_program

TINY = ["--config", str(ROOT / "configs" / "tiny" / "autoencoder.yaml"), "--validation_steps", "2"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    save_photos(tmp_path / "photos", 2, 64, 48)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRAIN_DATA", str(tmp_path / "photos"))
    return tmp_path


def test_tensorboard_sees_one_run_although_it_was_resumed(folder: Path) -> None:
    flags = ["--output_dir", "run", "--report_to", "tensorboard", "--validation_hq_dir", "photos"]
    flags += ["--lr_scheduler", "constant", "--checkpointing_steps", "2"]
    run_program("train_autoencoder", *TINY, *flags, "--max_train_steps", "3")
    (folder / "run" / "checkpoint-3" / "manifest.json").unlink()  # as if killed while it was written
    run_program("train_autoencoder", *TINY, *flags, "--max_train_steps", "4")

    events = EventAccumulator(str(folder / "run" / "logs" / "stablesr-kit"))
    events.Reload()
    losses = [json.loads(line) for line in (folder / "run" / "losses.jsonl").read_text().splitlines()]
    for name in ("pixel", "kl", "learning_rate"):
        seen = events.Scalars(f"train/{name}")
        assert [event.step for event in seen] == [1, 2, 3, 4]
        assert [event.value for event in seen] == pytest.approx([loss[name] for loss in losses])
    assert all(event.value > 0 for event in events.Scalars("train/samples_per_second"))
    lines = [json.loads(line) for line in (folder / "run" / "validation" / "metrics.jsonl").read_text().splitlines()]
    seen = events.Scalars("validation/psnr")
    assert [event.step for event in seen] == [line["step"] for line in lines] == [0, 2, 4]
    assert [event.value for event in seen] == pytest.approx([line["psnr"] for line in lines])
    pictures = events.Images("validation/000")
    assert [(event.step, event.height, event.width) for event in pictures] == [(step, 64, 48) for step in (0, 2, 4)]


def test_wandb_sees_one_run_although_it_was_resumed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    flags = ["--output_dir", "run", "--report_to", "wandb", "--validation_steps", "0"]
    for steps in ("1", "2"):
        run_program("train_autoencoder", *TINY, *flags, "--max_train_steps", steps)
    name = (folder / "run" / "logs" / "wandb_id").read_text().strip()
    runs = list((folder / "run" / "logs" / "wandb").glob(f"offline-run-*-{name}/run-{name}.wandb"))
    assert len(runs) == 2
    latest = time.monotonic() + 60  # wandb writes in a process of its own
    while not all(b"train/pixel" in file.read_bytes() for file in runs):
        assert time.monotonic() < latest
        time.sleep(0.2)


def test_a_tracker_that_is_missing_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_trackers("none") == [] and find_trackers("all") == ["tensorboard", "wandb"]
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert importlib.util.find_spec("wandb") is None
    with pytest.raises(ConfigError, match=r"report_to=all needs wandb; install with .*stablesr-kit\[trackers\]"):
        find_trackers("all")
