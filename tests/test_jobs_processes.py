"""A folder spread over two processes: every picture once, every failure once, the same files as from one process."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from tests.tiny import tiny_pipeline


def test_two_processes_share_a_folder_and_its_failures(tmp_path: Path) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "model")
    photos = tmp_path / "photos"
    photos.mkdir()
    for seed, name in enumerate(("a", "c", "d")):
        pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(photos / f"{name}.png")
    (photos / "b.png").write_bytes(b"no picture")
    arguments = ["restore", photos, tmp_path / "missing", "--model", tmp_path / "model", "--steps", "1", "-o"]

    alone = _run([sys.executable, "-m", "stablesr_kit.cli", *arguments, tmp_path / "alone"])
    with socket.socket() as free:
        free.bind(("", 0))
        port = str(free.getsockname()[1])
    launch = ["accelerate.commands.launch", "--cpu", "--num_processes", "2", "--main_process_port", port, "-m"]
    shared = _run([sys.executable, "-m", *launch, "stablesr_kit.cli", *arguments, tmp_path / "shared"])

    assert alone.returncode == shared.returncode == 1
    assert alone.stdout == f"3 restored, 2 failed: {tmp_path / 'alone'}\n"
    assert shared.stdout == f"3 restored, 2 failed: {tmp_path / 'shared'}\n"
    failures = [
        sorted(line for line in run.stderr.splitlines() if line.startswith("error: ")) for run in (alone, shared)
    ]
    assert len(failures[0]) == 2
    assert failures[0] == failures[1]
    for name in ("a.png", "c.png", "d.png"):
        assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "shared" / name).read_bytes()
    journal = (tmp_path / "shared" / ".stablesr" / "journal.jsonl").read_text().splitlines()
    assert len(journal) == 3


def _run(command: list[object]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment, check=False)
