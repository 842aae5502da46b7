"""`stablesr restore --engine ray` on a local Ray instance: the files of one process, failures listed, resumable."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from stablesr_kit.cli import app
from tests.helpers.tiny import tiny_pipeline


def test_without_ray_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_pipeline(with_text=False).save_pretrained(tmp_path / "model")
    Image.new("RGB", (4, 4)).save(tmp_path / "in.png")
    monkeypatch.setitem(sys.modules, "ray", None)
    arguments = ["restore", "in.png", "-o", "out.png", "--model", "model", "--engine", "ray"]
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "pip install 'stablesr-kit[ray]'" in result.stderr


@pytest.mark.parametrize("options", [("--workers", "2"), ("--workers", "0", "--engine", "ray")])
def test_workers_are_for_ray_and_at_least_one(options: tuple[str, ...], tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["restore", str(tmp_path), "-o", str(tmp_path), *options])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: --workers")


def test_two_workers_make_the_files_of_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray", reason="pip install 'stablesr-kit[ray]'")
    tiny_pipeline(with_text=False).save_pretrained(tmp_path / "model")
    (tmp_path / "photos").mkdir()
    for seed, name in enumerate(("a", "b", "c")):
        pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{name}.png")
    (tmp_path / "photos" / "broken.png").write_bytes(b"no picture")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    arguments = ["restore", "photos", "--model", "model", "--steps", "1", "-o"]

    alone = CliRunner().invoke(app, [*arguments, "alone"])
    try:
        spread = CliRunner().invoke(app, [*arguments, "spread", "--engine", "ray", "--workers", "2"])
    finally:
        ray.shutdown()
    assert alone.exit_code == spread.exit_code == 1
    assert spread.stdout.splitlines()[-1] == "3 restored, 1 failed: spread"
    failures = [[line for line in run.stderr.splitlines() if line.startswith("error: ")] for run in (alone, spread)]
    assert len(failures[1]) == 1
    assert failures[1][0].endswith(failures[0][0].removeprefix("error: "))
    for name in ("a.png", "b.png", "c.png"):
        assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "spread" / name).read_bytes()
    records = [json.loads(line) for line in (tmp_path / "spread" / ".stablesr" / "journal.jsonl").open()]
    assert sorted(name for record in records for name in record["results"]) == ["a.png", "b.png", "c.png"]

    (tmp_path / "photos" / "broken.png").unlink()
    again = CliRunner().invoke(app, [*arguments, "spread", "--resume"])
    assert (again.exit_code, again.stdout) == (0, "0 restored, 3 already there\n")
