"""A job killed again and again against the same job left alone: is the file the same, bit by bit?

    python -m benchmarks.kill --json [--size 2048 3072] [--kills 20] [--model mini] [--seed 0]

`stablesr restore --resume` makes a result of size height x width from a random picture: once undisturbed, while it is
noted when it saves what; and once with SIGKILLs at moments drawn evenly from the time the undisturbed run took after
loading. Each process goes on from what is saved, and is killed when it is as far as the undisturbed one was at the next
of those moments, however fast the machine is by then. Prints one JSON object; exit status 1 if the files differ, or if
the job ended before the last kill.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from stablesr_kit.errors import JobError
from stablesr_kit.pipelines.job import SamplingState

LAST_MOMENT = 0.97  # of the undisturbed run: later the job may be faster than its kill
POLL_S = 0.02


class Progress(NamedTuple):
    """What a job has saved: tiles encoded, steps taken, tiles decoded."""

    encoded: int = 0
    steps: int = 0
    decoded: int = 0


class Whole(NamedTuple):
    """The undisturbed run, in seconds since it began with the picture."""

    seconds: float
    saved: list[tuple[float, Progress]]
    """When it saved what."""

    def at(self, moment: float) -> tuple[Progress, float]:
        """What it had saved at a moment, and the seconds since."""
        when, progress = max(((when, saved) for when, saved in self.saved if when <= moment), default=(0.0, Progress()))
        return progress, moment - when


class Job:
    """The command that makes one result, and the files that tell how far it is."""

    def __init__(self, source: Path, target: Path, options: list[str]) -> None:
        self.target = target
        self.command = [sys.executable, "-m", "stablesr_kit.cli", "restore", str(source), "-o", str(target), *options]
        self.state = target.parent / ".stablesr" / f"{target.name}.job"
        self.lock = target.parent / ".stablesr" / f"{target.name}.lock"

    def begin(self) -> subprocess.Popen[bytes]:
        """A process that has loaded the model and has begun with the picture."""
        before = changed(self.lock)
        process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL)
        while process.poll() is None and changed(self.lock) in (None, before):
            time.sleep(POLL_S)
        return process

    def stage(self) -> str:
        """What it is at."""
        if (self.state / "decode-0").exists():
            return "decoding or writing"
        return "sampling" if (self.state / "sampling.pt").exists() else "encoding or first step"

    def progress(self) -> Progress:
        """What it has saved by now."""
        return Progress(
            tiles_done(self.state / "encode-0" / "record.pt"),
            steps_done(self.state / "sampling.pt"),
            tiles_done(self.state / "decode-0" / "record.pt"),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", required=True, help="print one JSON object")
    parser.add_argument("--size", type=int, nargs=2, default=(2048, 3072), metavar=("H", "W"), help="of the result")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    height, width = arguments.size
    if height % 4 or width % 4:
        parser.error(f"--size {height} {width} must be multiples of 4, since the picture is enlarged four times")
    moments = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        source = Path(name, "in.png")
        pixels = np.random.default_rng(0).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(source)
        undisturbed, killed = (
            Job(source, Path(name, target), ["--model", arguments.model, "--resume"])
            for target in ("whole.png", "killed.png")
        )
        whole = watched(undisturbed)
        at = sorted(moments.uniform(0, LAST_MOMENT * whole.seconds) for _ in range(arguments.kills))
        begun = time.perf_counter()
        stages = [live(killed, *whole.at(moment)) for moment in at]
        if killed.begin().wait():
            raise SystemExit("the job that was killed could not be finished")
        kills = sum(stage is not None for stage in stages)
        is_equal = undisturbed.target.read_bytes() == killed.target.read_bytes()
        print(
            json.dumps(
                {
                    "model": arguments.model,
                    "size": [height, width],
                    "whole_s": round(whole.seconds, 1),
                    "saved": len(whole.saved) - 1,
                    "kills": kills,
                    "killed_at_s": [round(moment, 1) for moment in at],
                    "killed_while": {stage: stages.count(stage) for stage in stages if stage is not None},
                    "killed_s": round(time.perf_counter() - begun, 1),
                    "is_bitwise_equal": is_equal,
                }
            )
        )
    sys.exit(not is_equal or kills < arguments.kills)


def watched(job: Job) -> Whole:
    """Run the job to its end."""
    process = job.begin()
    begun = time.perf_counter()
    saved = [(0.0, Progress())]
    while process.poll() is None:
        now = job.progress()
        if now > saved[-1][1]:
            saved.append((time.perf_counter() - begun, now))
        time.sleep(POLL_S)
    if process.returncode:
        raise SystemExit(f"the undisturbed job ended with status {process.returncode}")
    return Whole(time.perf_counter() - begun, saved)


def live(job: Job, progress: Progress, more_s: float) -> str | None:
    """Let the job go on until it has saved this much, and then for some seconds or until it saves more; kill it.

    Returns the stage it was at; None if it had ended.
    """
    process = job.begin()
    while process.poll() is None and job.progress() < progress:
        time.sleep(POLL_S)
    reached = time.perf_counter()
    while process.poll() is None and time.perf_counter() - reached < more_s and job.progress() <= progress:
        time.sleep(POLL_S)
    stage = job.stage()
    process.kill()
    return stage if process.wait() < 0 else None


def tiles_done(record: Path) -> int:
    """Tiles in a record of encoding or decoding; 0 if there is none."""
    ctime = changed(record)
    return 0 if ctime is None else _tiles_done(record, ctime)


def steps_done(state: Path) -> int:
    """Steps in a saved state of sampling; 0 if there is none."""
    ctime = changed(state)
    return 0 if ctime is None else _steps_done(state, ctime)


@lru_cache(maxsize=2)
def _tiles_done(record: Path, _ctime: int) -> int:
    with suppress(FileNotFoundError):  # the job has just ended
        return sum(done for done, _, _ in torch.load(record, weights_only=True)["passes"])
    return 0


@lru_cache(maxsize=1)
def _steps_done(state: Path, _ctime: int) -> int:
    with suppress(JobError):
        return SamplingState.load(state).step
    return 0


def changed(path: Path) -> int | None:
    """When the file was made or changed last, in nanoseconds; None if it is not there."""
    try:
        return path.stat().st_ctime_ns
    except FileNotFoundError:
        return None


if __name__ == "__main__":
    main()
