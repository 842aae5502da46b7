"""A clip through `stablesr restore` from end to end: what comes out, how much memory it takes, and what kills do to it.

    python -m benchmarks.clip --json [--only whole memory kills] [--seconds 10] [--side 256] [--kills 10]

The clip, Matroska with side x side pixels, moves over a photograph of scikit-image at 12 to 25 frames per second by
turns, with sound that ends after the picture, subtitles, chapters and an attachment. It is restored at its own size.

whole: are the times of all frames, and all packets that are not video, those of the source?
memory: the peak of a process for half the seconds and for twice as many.
kills: SIGKILLs spread over a job of the whole clip: while it is read, at chunks from the first to the last, some in the
middle of writing, and while the file is made. Each process goes on from what the one before has left. Is the file that
of an undisturbed run, bit by bit?

Exit status 1 if something is not as it should be.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from skimage import data

from benchmarks.kill import changed
from tests.helpers.clips import packets_of, times_of, write_clip

INTERVALS_MS = (40, 40, 45, 83, 40, 62, 50, 71, 40, 56)
"""From frame to frame: 12 to 25 frames per second."""
POLL_S = 0.002
MOST_GROWTH = 0.1
"""Of the peak of memory from the short clip to one of four times its length."""
PARTS = ("whole", "memory", "kills")


class Moment(NamedTuple):
    """When to kill: so many chunks are in the journal, a file is written or not, and some seconds passed since then."""

    chunks: int
    is_writing: bool
    more_s: float


class Job:
    """The command that restores a clip, and the files that tell how far it is."""

    def __init__(self, source: Path, target: Path, options: list[str]) -> None:
        self.target = target
        command = [sys.executable, "-m", "stablesr_kit.cli", "restore", source, "-o", target, "--json", *options]
        self.command = [str(part) for part in command]
        self.state = target.parent / ".stablesr" / f"{target.name}.job"

    def begin(self) -> subprocess.Popen[str]:
        return subprocess.Popen(self.command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    def run(self) -> tuple[dict[str, Any], int]:
        """Its report, and the peak of its memory in bytes."""
        process = self.begin()
        assert process.stdout is not None
        said = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"restoring {self.target.name} ended with status {process.returncode}: {said}")
        return json.loads(said), usage.ru_maxrss * 1024

    def chunks(self) -> int:
        """Finished ones."""
        with suppress(FileNotFoundError):
            return (self.state / "clip.jsonl").read_bytes().count(b"\n")
        return 0

    def is_writing(self) -> bool:
        """Whether a file is written in this moment."""
        with suppress(FileNotFoundError):
            return any(name.endswith(".part") for name in os.listdir(self.state))
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", required=True, help="print one JSON object")
    parser.add_argument("--only", nargs="*", default=list(PARTS), choices=PARTS, help="which parts")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--side", type=int, default=256, help="of the frames, in pixels; 256 at most")
    parser.add_argument("--kills", type=int, default=10, help="5 or more")
    parser.add_argument("--model", default="mini")
    parser.add_argument("--steps", type=int, default=None, help="the model's own number if not given")
    parser.add_argument("--chunk", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    given = parser.parse_args()
    if given.kills < 5:
        parser.error(f"--kills {given.kills} are too few to be spread over a clip; give 5 or more")
    options = ["--model", given.model, "--scale", "1", "--coarse", "--chunk", str(given.chunk), "--resume"]
    options += [] if given.steps is None else ["--steps", str(given.steps)]
    told: dict[str, Any] = {"model": given.model, "steps": given.steps, "side": given.side, "chunk": given.chunk}
    is_right = True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = make_clip(folder / "in.mkv", given.seconds, given.side)
        if "whole" in given.only:
            told["whole"] = whole(source, Job(source, folder / "out.mkv", options))
            is_right &= told["whole"]["are_times_equal"] and told["whole"]["are_packets_equal"]
        if "memory" in given.only:
            told["memory"] = memory(folder, given.seconds, given.side, options)
            is_right &= abs(told["memory"]["growth"]) <= MOST_GROWTH
        if "kills" in given.only:
            undisturbed, killed = (Job(source, folder / name, options) for name in ("undisturbed.mkv", "killed.mkv"))
            told["kills"] = kills(undisturbed, killed, given.kills, random.Random(given.seed))
            is_right &= told["kills"]["is_bitwise_equal"] and told["kills"]["kills"] == given.kills
    print(json.dumps(told, indent=1))
    sys.exit(not is_right)


def make_clip(path: Path, seconds: float, side: int) -> Path:
    """A slow pan over a photograph and back, with noise of each frame's own."""
    photo, noise = data.astronaut(), np.random.default_rng(0)
    times, intervals = [0], cycle(INTERVALS_MS)
    while times[-1] < 1000 * seconds:
        times.append(times[-1] + next(intervals))
    times.pop()
    most = len(photo) - side

    def frames() -> Iterator[np.ndarray]:
        for i in range(len(times)):
            at = most - abs(i % (2 * most) - most)
            seen = photo[at : at + side, at // 2 : at // 2 + side]
            yield (seen + noise.normal(0, 2, seen.shape)).round().clip(0, 255).astype(np.uint8)

    spoken = [(1000 * second, 800, f"second {second}") for second in range(int(seconds))]
    return write_clip(
        path, list(frames()), times, audio_seconds=seconds + 0.7, subtitles=spoken, attachment=b"a font", chapters=True
    )


def whole(source: Path, job: Job) -> dict[str, Any]:
    """Restore it undisturbed, and compare with the source what is to be kept."""
    begun = time.perf_counter()
    report, _ = job.run()
    times, packets = times_of(source), packets_of(source)
    made = packets_of(job.target)
    gaps = [float(after - before) for before, after in zip(times, times[1:], strict=False)]
    return {
        "frames": len(times),
        "fps": [round(1 / max(gaps), 2), round(1 / min(gaps), 2)],
        "seconds": round(time.perf_counter() - begun, 1),
        "seconds_per_frame": round((time.perf_counter() - begun) / len(times), 3),
        "are_times_equal": times_of(job.target) == times,
        "are_packets_equal": made == packets,
        "packets": {kind: len(of_kind) for kind, of_kind in made.items()},
        "cuts": report["cuts"],
        "notes": report["notes"],
    }


def memory(folder: Path, seconds: float, side: int, options: list[str]) -> dict[str, Any]:
    """Peaks of two processes."""
    peaks = {}
    for length in (seconds / 2, 2 * seconds):
        source = make_clip(folder / f"{length:g}.mkv", length, side)
        _, peaks[f"{length:g} s"] = Job(source, folder / f"{length:g} made.mkv", options).run()
    short, long = peaks.values()
    return {
        "peak_mb": {name: round(peak / 1e6, 1) for name, peak in peaks.items()},
        "growth": round(long / short - 1, 4),
    }


def kills(undisturbed: Job, killed: Job, count: int, draw: random.Random) -> dict[str, Any]:
    """Kill one job again and again, and compare with the other."""
    begun = time.perf_counter()
    process = undisturbed.begin()
    while not undisturbed.state.exists() and process.poll() is None:
        time.sleep(POLL_S)
    reading_s = time.perf_counter() - begun
    finished, made = [reading_s], reading_s
    while process.poll() is None:
        finished += [time.perf_counter() - begun] * (undisturbed.chunks() - len(finished) + 1)
        made = time.perf_counter() - begun if not undisturbed.target.exists() else made
        time.sleep(POLL_S)
    if process.returncode:
        raise SystemExit(f"the undisturbed job ended with status {process.returncode}")
    chunks = len(finished) - 1
    chunk_s, making_s = (finished[-1] - reading_s) / chunks, made - finished[-1]

    # One while the clip is read, two while the file is made, the others at chunks from the first to the last
    middle = count - 3
    moments = [Moment(0, False, draw.uniform(-0.3, 0.0) * reading_s)]
    for i in range(middle):
        is_writing = i % 3 == 2
        more_s = draw.uniform(0, 0.004) if is_writing else draw.uniform(0.1, 0.9) * chunk_s
        moments.append(Moment(round(i * (chunks - 1) / max(middle - 1, 1)), is_writing, more_s))
    moments += [Moment(chunks, True, draw.uniform(*share) * making_s) for share in ((0.0, 0.3), (0.4, 0.8))]

    points = [killed_at(killed, moment, reading_s) for moment in moments]
    killed.run()
    return {
        "chunks": chunks,
        "undisturbed_s": round(finished[-1] + making_s, 1),
        "kills": sum(point is not None for point in points),
        "killed_at": points,
        "is_bitwise_equal": undisturbed.target.read_bytes() == killed.target.read_bytes(),
    }


def killed_at(job: Job, moment: Moment, reading_s: float) -> str | None:
    """Let the job go on to a moment, and kill it; what it was at. None if it had ended."""
    lock = job.state.with_suffix(".lock")
    before, begun = changed(lock), time.perf_counter()
    process = job.begin()

    def is_at_moment() -> bool:
        is_begun = changed(lock) not in (None, before)
        return is_begun and job.chunks() >= moment.chunks and job.is_writing() == moment.is_writing

    if moment.more_s < 0:  # before the end of reading, which leaves no trace
        time.sleep(max(reading_s + moment.more_s, 0))
    else:
        while process.poll() is None and not is_at_moment():
            time.sleep(POLL_S)
        time.sleep(moment.more_s)
    done, is_writing, was_reading = job.chunks(), job.is_writing(), not job.state.exists()
    process.kill()
    if process.wait() >= 0:
        return None
    at = f"{time.perf_counter() - begun:.1f} s after its start"
    if job.target.exists():
        return f"ending, its file is made, {at}"
    if was_reading:
        return f"reading the clip, {at}"
    return f"{'writing' if is_writing else 'computing'} after {done} chunks, {at}"


if __name__ == "__main__":
    main()
