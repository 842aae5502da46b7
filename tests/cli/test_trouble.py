"""Jobs in trouble, through the command: a disk that fills up in the middle, a picture in other hands."""

from pathlib import Path

import numpy as np
from PIL import Image
from typer.testing import CliRunner, Result

from stablesr_kit.cli import app
from stablesr_kit.cli.journal import Journal
from tests.helpers.file_limits import files_end_at


def restore(folder: Path, model: Path, output: str, *options: object) -> Result:
    arguments = [folder / "in.png", "-o", folder / output, "--model", model, "--tile", 32, *options]
    result = CliRunner().invoke(app, ["restore", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_a_disk_that_fills_up_is_one_line_wherever_it_does_and_the_job_goes_on(model: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "in.png")
    assert restore(tmp_path, model, "whole.png").exit_code == 0
    reasons = set()
    for size in (2_000, 12_000, 40_000, 80_000, 120_000):  # from the first record to the largest map
        with files_end_at(size):
            result = restore(tmp_path, model, "full.png", "--resume")
        if result.exit_code == 0:
            break
        errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        assert "File too large" in errors[0]
        assert "free space" in errors[0]
        assert not (tmp_path / "full.png").exists()
        reasons.add(errors[0].partition("cannot be")[0])
    assert len(reasons) > 1
    assert restore(tmp_path, model, "full.png", "--resume").exit_code == 0
    assert (tmp_path / "full.png").read_bytes() == (tmp_path / "whole.png").read_bytes()
    assert not (tmp_path / ".stablesr").exists()


def test_a_picture_in_other_hands_and_one_of_other_settings_are_one_line(model: Path, tmp_path: Path) -> None:
    Image.new("RGB", (5, 4)).save(tmp_path / "in.png")
    with Journal(tmp_path, {}).in_progress(tmp_path / "in.png", tmp_path / "out.png"):
        result = restore(tmp_path, model, "out.png", "--resume")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == (
        f"error: {tmp_path / 'out.png'}: another process is restoring this picture; wait for it or stop it"
    )
    with files_end_at(2_000):
        assert restore(tmp_path, model, "out.png").exit_code == 1
    result = restore(tmp_path, model, "out.png", "--resume", "--w", 0.25)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == (
        f"error: {tmp_path / 'out.png'}: was made with w 0.5 (now 0.25); give the same settings, "
        "or start again without --resume"
    )
