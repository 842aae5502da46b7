"""A file that cannot be written ends a run with one line; nothing whole is lost and nothing half is left."""

import logging
import tempfile
from pathlib import Path

import pytest
import torch

from stablesr_kit.errors import OutputError
from stablesr_kit.evaluation.quality import Quality
from stablesr_kit.training.run.networks import save_network
from stablesr_kit.training.run.reporting import StepRecords, read_records
from stablesr_kit.training.run.run import LogFile
from stablesr_kit.training.run.state import whole_checkpoints
from stablesr_kit.training.run.validation import PhotoValidationOptions, Validation, ValidationOptions, photo_examples
from stablesr_kit.training.small import build_small_autoencoder
from tests.helpers.file_limits import files_end_at
from tests.helpers.photo_files import save_photos
from tests.helpers.training_runs import run_program, tiny


def test_a_checkpoint_that_does_not_fit_leaves_the_last_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRAIN_DATA", str(save_photos(tmp_path / "photos", 2, 32, 32)))
    run = tmp_path / "run"
    call = tiny("train_autoencoder", "autoencoder", "--output_dir", str(run), "--lr_scheduler", "constant")
    run_program(*call, "--max_train_steps", "2")
    capsys.readouterr()
    # the networks fit, the optimizer's state, written by torch itself, does not
    networks = max(file.stat().st_size for file in run.rglob("*.safetensors"))
    assert networks * 1.5 < (run / "checkpoint-2" / "optimizer.bin").stat().st_size
    for limit in (networks // 2, networks * 3 // 2):
        with files_end_at(limit), pytest.raises(SystemExit, match="1"):
            run_program(*call, "--max_train_steps", "4")
        *_, line = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert f"{run}/checkpoint-4" in line and "cannot be written" in line and "MB are free there" in line
        assert "goes on from the last whole checkpoint" in line
        assert whole_checkpoints(run) == [run / "checkpoint-2"]
        assert not list(run.rglob("*.part"))
    run_program(*call, "--max_train_steps", "4")
    assert run / "checkpoint-4" in whole_checkpoints(run)
    assert [record["step"] for record in read_records(run / "losses.jsonl")] == [1, 2, 3, 4]


def test_a_result_that_does_not_fit_leaves_the_old_one(tmp_path: Path) -> None:
    vae = build_small_autoencoder((8, 16), 4, 1)
    save_network(vae, tmp_path / "vae")
    before = sorted((file.name, file.read_bytes()) for file in (tmp_path / "vae").iterdir())
    with files_end_at(4096), pytest.raises(OutputError, match="vae: cannot be written"):
        save_network(vae, tmp_path / "vae")
    assert sorted((file.name, file.read_bytes()) for file in (tmp_path / "vae").iterdir()) == before
    assert [path.name for path in tmp_path.iterdir()] == ["vae"]


def test_validation_pictures_that_do_not_fit_leave_nothing(tmp_path: Path) -> None:
    photos = str(save_photos(tmp_path / "photos", 1, 64, 64))
    examples = photo_examples(PhotoValidationOptions(validation_steps=1, validation_hq_dir=photos), 8)
    validation = Validation(tmp_path, ValidationOptions(), "network", examples, lambda _, it: it.lq * 0.9, Quality())
    validation.resume(0)
    with files_end_at(100), pytest.raises(OutputError, match=r"step-000001: cannot be written \(File too large\)"):
        validation.show(torch.nn.Linear(1, 1), 1)
    assert [path.name for path in (tmp_path / "validation").iterdir()] == ["metrics.jsonl"]
    metrics, pictures = validation.show(torch.nn.Linear(1, 1), 1)
    assert list(metrics) == ["grid", "psnr", "ssim"] and list(pictures) == ["000"]


def test_records_that_do_not_fit_are_cut_back_to_whole_lines_by_the_next_run(tmp_path: Path) -> None:
    file = tmp_path / "losses.jsonl"
    records = StepRecords(file, 0)
    records.add(1, {"loss": 1.0})
    with files_end_at(40), pytest.raises(OutputError, match=r"losses\.jsonl: cannot be written \(File too large\)"):
        records.add(2, {"loss": 2.0})
    records.close()
    StepRecords(file, 2).close()
    assert read_records(file) == [{"step": 1, "loss": 1.0}]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
def test_a_log_on_a_full_disk_ends_the_run_with_the_systems_words() -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "log.txt").symlink_to("/dev/full")
        log = LogFile(Path(folder) / "log.txt")
        with pytest.raises(OutputError, match="cannot be written \\(No space left on device\\)"):
            log.emit(logging.makeLogRecord({"msg": "step 1"}))
        with pytest.raises(OSError, match="No space left"):
            log.close()
