"""Time and memory of `stablesr restore` as the result grows: is memory flat, and the time per megapixel constant?

    python -m benchmarks.growth --json [--megapixels 1 4 9 24] [--mode exact approximate] [--plot growth.svg]

Each result, enlarged four times from a random smooth picture, is made by the command in a process of its own, in the
proportions of 4096x6144 (which "24" is). Prints one JSON object: for each, the seconds of the command and those of the
processor, both also per megapixel without what a picture of 64x64 takes in all, and the process's peak resident memory.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from stablesr_kit.imaging.canvas import View
from stablesr_kit.pipelines.pictures import to_pil
from stablesr_kit.spaces import unit_to_image

FULL = (4096, 6144)
START = (64, 64)


class Run(NamedTuple):
    """One command: the result's size, how long it took, by clock and of the processor, and the most memory it held."""

    height: int
    width: int
    seconds: float
    cpu_seconds: float
    peak_rss_mb: int

    @property
    def megapixels(self) -> float:
        return self.height * self.width / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", required=True, help="print one JSON object")
    parser.add_argument("--model", default="mini")
    parser.add_argument("--megapixels", type=float, nargs="+", default=[1, 4, 9, 24], metavar="MP")
    parser.add_argument("--mode", nargs="+", choices=["exact", "approximate"], default=["exact", "approximate"])
    parser.add_argument("--w", type=float, default=0.5)
    parser.add_argument("--plot", type=Path, default=None, metavar="FILE", help="also draw both curves")
    arguments = parser.parse_args()
    options = ["--model", arguments.model, "--w", str(arguments.w)]
    start = measured(*START, options)
    curves = {
        mode: [measured(*size_of(mp), [*options, "--mode", mode]) for mp in arguments.megapixels]
        for mode in arguments.mode
    }
    print(
        json.dumps(
            {
                "w": arguments.w,
                "cpus": os.cpu_count(),
                "start_s": round(start.seconds, 1),
                "start_peak_rss_mb": start.peak_rss_mb,
                **{mode: [summary(run, start) for run in runs] for mode, runs in curves.items()},
            }
        )
    )
    if arguments.plot is not None:
        plot(curves, start, arguments.plot)


def size_of(megapixels: float) -> tuple[int, int]:
    """Height and width, multiples of 64, as many times smaller than 4096 x 6144 as `megapixels` than 24."""
    scale = math.sqrt(megapixels / 24)
    height, width = (max(round(side * scale / 64), 1) * 64 for side in FULL)
    return height, width


def measured(height: int, width: int, options: list[str]) -> Run:
    """The command for a result of this size, on a picture made for it."""
    coarse = torch.rand(1, 3, max(height // 64, 2), max(width // 64, 2), generator=torch.Generator().manual_seed(0))
    picture = unit_to_image(F.interpolate(coarse, (height // 4, width // 4), mode="bilinear"))
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "in.png")
        to_pil(View(picture)).save(source)
        command = ["-m", "stablesr_kit.cli", "restore", str(source), "-o", str(Path(folder, "out.png")), *options]
        begun = time.perf_counter()
        process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"the command for {height}x{width} ended with status {process.returncode}")
        took = time.perf_counter() - begun
        return Run(height, width, took, usage.ru_utime + usage.ru_stime, usage.ru_maxrss // 1024)


def summary(run: Run, start: Run) -> dict[str, object]:
    """What is printed of a run."""
    return {
        "size": [run.height, run.width],
        "megapixels": round(run.megapixels, 2),
        "seconds": round(run.seconds, 1),
        "cpu_seconds": round(run.cpu_seconds, 1),
        "s_per_megapixel": round((run.seconds - start.seconds) / run.megapixels, 2),
        "cpu_s_per_megapixel": round((run.cpu_seconds - start.cpu_seconds) / run.megapixels, 2),
        "peak_rss_mb": run.peak_rss_mb,
    }


def plot(curves: dict[str, list[Run]], start: Run, path: Path) -> None:
    """Seconds per megapixel and peak memory over megapixels, a line per mode."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    time_axes, memory_axes = figure.subplots(1, 2)
    for mode, runs in curves.items():
        megapixels = [run.megapixels for run in runs]
        time_axes.plot(
            megapixels, [(run.seconds - start.seconds) / run.megapixels for run in runs], marker="o", label=mode
        )
        memory_axes.plot(megapixels, [run.peak_rss_mb / 1024 for run in runs], marker="o", label=mode)
    time_axes.set(ylabel="seconds per megapixel")
    memory_axes.set(ylabel="peak resident memory, GiB")
    for axes in (time_axes, memory_axes):
        axes.set(xlabel="megapixels of the result", ylim=(0, 1.1 * axes.get_ylim()[1]))
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right")
    figure.savefig(path)


if __name__ == "__main__":
    main()
