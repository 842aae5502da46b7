"""A folder, and a single picture, spread over two processes: the same files as from one process, failures once."""

import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from tests.helpers.cli_runs import stablesr, stablesr_in_two_processes
from tests.helpers.forks import free_port
from tests.helpers.tiny import tiny_pipeline

PLAIN = """
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *of: None if name == "torchvision" else find(name, *of)
from stablesr_kit.cli import main
main()
"""
"""The command where torchvision is not installed, which transformers would tell."""


def test_two_processes_share_a_folder_and_its_failures(tmp_path: Path) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "model")
    photos = tmp_path / "photos"
    photos.mkdir()
    for seed, name in enumerate(("a", "c", "d")):
        pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(photos / f"{name}.png")
    (photos / "b.png").write_bytes(b"no picture")
    arguments = ["restore", photos, tmp_path / "missing", "--model", tmp_path / "model", "--steps", "1", "-o"]

    alone = _run([sys.executable, "-c", PLAIN, *arguments, tmp_path / "alone"])
    launch = ["accelerate.commands.launch", "--cpu", "--num_processes", "2", "--main_process_port", free_port(), "-m"]
    shared = _run([sys.executable, "-m", *launch, "stablesr_kit.cli", *arguments, tmp_path / "shared"])

    assert alone.returncode == shared.returncode == 1
    assert alone.stdout == f"3 restored, 2 failed: {tmp_path / 'alone'}\n"
    assert shared.stdout == f"3 restored, 2 failed: {tmp_path / 'shared'}\n"
    failures = [
        sorted(line for line in run.stderr.splitlines() if line.startswith("error: ")) for run in (alone, shared)
    ]
    assert failures[0] == sorted(alone.stderr.splitlines()) and len(failures[0]) == 2
    assert failures[0] == failures[1]
    for name in ("a.png", "c.png", "d.png"):
        assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "shared" / name).read_bytes()
    journal = (tmp_path / "shared" / ".stablesr" / "journal.jsonl").read_text().splitlines()
    assert len(journal) == 3


def test_two_processes_share_what_is_degraded(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for seed in range(3):
        pixels = np.random.default_rng(seed).integers(0, 256, (48, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(photos / f"{seed}.png")
    shared = stablesr_in_two_processes(
        "degrade", photos, tmp_path / "missing", "-o", tmp_path / "shared", folder=tmp_path
    )
    assert (shared.returncode, shared.stdout) == (1, f"3 degraded, 1 failed: {tmp_path / 'shared'}\n"), shared.stderr
    assert stablesr("degrade", photos, "-o", tmp_path / "alone").exit_code == 0
    for file in (tmp_path / "alone").iterdir():
        assert file.read_bytes() == (tmp_path / "shared" / file.name).read_bytes()


def test_two_processes_share_the_tiles_of_one_picture(tmp_path: Path) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "model")
    pixels = np.random.default_rng(0).integers(0, 256, (33, 41, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "in.png")
    arguments = ["restore", tmp_path / "in.png", "--model", tmp_path / "model", "-o"]
    shared = stablesr_in_two_processes(*arguments, tmp_path / "shared.png", folder=tmp_path)
    assert (shared.returncode, shared.stdout) == (0, f"1 restored: {tmp_path / 'shared.png'}\n"), shared.stderr
    assert shared.stderr.count("plan: tiles of 16 x 16 latents") == 1
    assert stablesr(*arguments, tmp_path / "alone.png").exit_code == 0
    assert (tmp_path / "shared.png").read_bytes() == (tmp_path / "alone.png").read_bytes()


def _run(command: list[object]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
