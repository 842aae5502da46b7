"""The launchable programs and the benchmarks run as a user runs them."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


def test_upscale_photo_puts_the_fidelities_side_by_side(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    arguments = [str(tmp_path / "photo.png"), "-o", str(tmp_path / "sheet.png"), "--model", str(model)]
    monkeypatch.setattr(sys, "argv", ["upscale_photo.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "pipelines" / "upscale_photo.py"), run_name="__main__")
    assert ended.value.code == 0
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (20, 4 * 28, 3)
    bicubic, *restored = np.split(sheet, 4, axis=1)
    assert all((bicubic != one).any() for one in restored)


def test_the_restore_benchmark_prints_one_json_object(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--json", "--model", str(model), "--size", "8", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", ["restore.py", *arguments])
    runpy.run_path(str(ROOT / "benchmarks" / "restore.py"), run_name="__main__")
    result = json.loads(capsys.readouterr().out)
    assert result["call_s"] > 0
    assert result["steps"] == 2


def test_where_optional_packages_are_missing_only_our_own_lines_are_printed(model: Path, tmp_path: Path) -> None:
    """transformers warns of every class whose best version needs torchvision."""
    Image.new("RGB", (8, 8), "teal").save(tmp_path / "photo.png")
    command = ["restore", str(tmp_path / "photo.png"), "-o", str(tmp_path / "out.png"), "--model", str(model)]
    program = f"""
import sys
sys.modules["torchvision"] = sys.modules["deepspeed"] = None
sys.argv = ["stablesr", *{command!r}]
from stablesr_kit.cli import main
main()
"""
    finished = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (finished.stdout, finished.stderr) == (f"1 restored: {tmp_path / 'out.png'}\n", "")
