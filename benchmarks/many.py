"""A folder of very many tiny pictures: is any lost, does memory grow, does a run that was killed go on?

    python -m benchmarks.many --json [--count 10000] [--model DIR]

`stablesr restore` is killed with SIGKILL when half of the results are there, and continued with --resume. Without a
model, a random one of a few thousand parameters is made, so that what is measured is everything but the networks. Each
process's memory is compared from its 1,000th picture on (a tenth of the pictures, if there are fewer than 10,000).
Prints one JSON object; exit status 1 if a picture is lost, a result is not whole, something else than results is left,
or memory grew by more than a tenth.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from stablesr_kit.imaging.reading import read_picture
from tests.helpers.tiny import tiny_pipeline

PER_FOLDER = 500
POLL_S = 0.2
MOST_GROWTH = 1.1


def main() -> int:
    """Make the pictures, restore them in two runs, and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--json", action="store_true", help="print one JSON object (there is no other output)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = options.model or folder / "model"
        if options.model is None:
            tiny_pipeline(with_text=False).save_pretrained(model)
        for number in range(options.count):
            path = folder / "photos" / f"{number // PER_FOLDER:03d}" / f"{number:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(number).integers(0, 256, (4, 5, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path)
        out, settled = folder / "out", min(1000, options.count // 10)
        command = [sys.executable, "-m", "stablesr_kit.cli", "restore", str(folder / "photos"), "-o", str(out)]
        command += ["--model", str(model), "--steps", "1", "--scale", "1", "--resume"]
        killed = watched(command, out, settled, stop_at=options.count // 2)
        resumed = watched(command, out, settled)
        expected = {path.relative_to(folder / "photos") for path in (folder / "photos").rglob("*.png")}
        left = {path.relative_to(out) for path in out.rglob("*") if not path.is_dir()}
        sizes = {read_picture(out / path).rgb.size for path in expected & left}
    report = {
        "pictures": options.count,
        "lost": len(expected - left),
        "left besides results": sorted(map(str, left - expected)),
        "sizes": sorted(sizes),
        "killed run": killed,
        "resumed run": resumed,
    }
    is_flat = all(run["memory growth"] <= MOST_GROWTH for run in (killed, resumed))
    sys.stdout.write(json.dumps(report) + "\n")
    return int(bool(report["lost"] or report["left besides results"] or len(sizes) != 1 or not is_flat))


def watched(command: list[str], out: Path, settled: int, stop_at: int | None = None) -> dict[str, float]:
    """Run it, killing it when there are `stop_at` results; its memory from the `settled`-th picture on."""
    before, start = count_results(out), time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    memory = psutil.Process(process.pid)
    sizes: list[int] = []
    while process.poll() is None:
        results = count_results(out)
        if results - before >= settled:
            sizes.append(memory.memory_info().rss)
        if stop_at is not None and results >= stop_at:
            process.kill()
            process.wait()
        time.sleep(POLL_S)
    return {
        "results": count_results(out) - before,
        "seconds": round(time.perf_counter() - start, 1),
        "memory (MB)": round(sizes[0] / 2**20, 1) if sizes else 0,
        "peak after (MB)": round(max(sizes) / 2**20, 1) if sizes else 0,
        "memory growth": round(max(sizes) / sizes[0], 3) if sizes else 0,
    }


def count_results(out: Path) -> int:
    """Results in the folders there are; their names are those of the pictures."""
    return sum(1 for _ in out.glob("[0-9]*/*.png")) if out.exists() else 0


if __name__ == "__main__":
    sys.exit(main())
