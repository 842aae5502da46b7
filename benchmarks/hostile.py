"""Files that mean harm or are broken, through restore, faces and degrade: does each cost one line and nothing else?

    python -m benchmarks.hostile --json [--count 300] [--seed 0]

Files are valid ones of every format, mutated: truncated, with flipped bits, inflated headers, directories in circles,
endings and names that lie, drawings and programs, text and profiles without end (tests/helpers/hostile_files.py). Each
is worked on by itself by what the commands use, and is to give a result or one line within 10 seconds. Prints one JSON
object; exit status 1 if an error is no StableSRKitError, a file takes longer, memory grows by more than
600 MB, or a file appears outside the folder of results.
"""

import argparse
import contextlib
import io
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from stablesr_kit import Tiling
from stablesr_kit.cli.degrade import degrade_file
from stablesr_kit.cli.face_stage import load_face_model
from stablesr_kit.cli.faces import restore_photo
from stablesr_kit.cli.jobs import Job, Report, Told, make_folder, plan, run
from stablesr_kit.cli.restorer import Restorer, Restoring
from stablesr_kit.errors import ImageError
from stablesr_kit.imaging.reading import open_picture
from stablesr_kit.imaging.resizing import resize_bicubic
from stablesr_kit.pipelines.face_refinement import FaceRefinement
from tests.helpers.hostile_files import hostile_files
from tests.helpers.tiny import tiny_pipeline

LONGEST_S = 10.0
MOST_GROWTH_MB = 600.0
MOST_PIXELS = 250_000


def main() -> int:
    """Make the files and work on them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object (there is no other output)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        report = judged(Path(name), options.count, options.seed)
    sys.stdout.write(json.dumps(report) + "\n")
    return int(not report["is_good"])


def judged(folder: Path, count: int, seed: int) -> dict[str, Any]:
    """What became of the files in each command."""
    (folder / "in").mkdir()
    hostile_files(folder / "in", count, seed)
    tiny_pipeline(with_text=False).save_pretrained(folder / "model")
    works: dict[str, Callable[[Path], Callable[[Job], Told | None]]] = {
        "restore": lambda out: restorer(folder / "model", out),
        "faces": lambda _: faces,
        "degrade": lambda _: lambda job: degrade_file(job, "stablesr-512", 0, 1),
    }
    before = {path for path in folder.rglob("*") if not path.is_relative_to(folder / "out")}
    commands = {name: tried(folder / "in", folder / "out" / name, work) for name, work in works.items()}
    outside = {path for path in folder.rglob("*") if not path.is_relative_to(folder / "out")} - before
    is_good = not outside and all(
        not one["faults"]
        and one["longest_s"] < LONGEST_S
        and one["growth_mb"] < MOST_GROWTH_MB
        and one["results"] + one["lines"] + one["passed_over"] == count
        for one in commands.values()
    )
    return {"files": count, "commands": commands, "outside": sorted(map(str, outside)), "is_good": is_good}


def tried(inputs: Path, out: Path, make_work: Callable[[Path], Callable[[Job], Told | None]]) -> dict[str, Any]:
    """Each file by itself: results, lines, what was not one line, the longest time and the growth of memory."""
    spoken = io.StringIO()
    faults: list[str] = []
    slowest, longest = "", 0.0
    with contextlib.redirect_stderr(spoken), contextlib.redirect_stdout(spoken):
        report = Report("done")
        jobs = plan([inputs], out, None, report)
        make_folder(out)
        work = make_work(out)
        memory = psutil.Process().memory_info
        settled = memory().rss
        peak = settled
        for job in jobs:
            start = time.perf_counter()
            try:
                run([job], lambda job: work(not_large(job)), report)
            except Exception as error:  # what this looks for
                faults.append(f"{job.source.name!r}: {type(error).__name__}: {error}"[:300])
            seconds = time.perf_counter() - start
            if seconds > longest:
                slowest, longest = job.source.name, seconds
            peak = max(peak, memory().rss)
    lines = [line for line in spoken.getvalue().splitlines() if line.startswith("error: ")]
    return {
        "results": len(report.written),
        "lines": len(lines),
        "passed_over": len(list(inputs.iterdir())) - len(jobs),
        "faults": faults,
        "longest_s": round(longest, 2),
        "slowest": slowest,
        "growth_mb": round((peak - settled) / 2**20, 1),
    }


def not_large(job: Job) -> Job:
    """The job, unless a header that was tampered with makes a large picture of it, whose restoration is no hang."""
    picture = open_picture(job.source)
    if picture.height * picture.width > MOST_PIXELS:
        raise ImageError(f"{job.source}: {picture.width}x{picture.height} pixels are left out here")
    return job


def restorer(model: Path, out: Path) -> Restorer:
    """What `stablesr restore` does with each picture, with a tiny model."""
    options: dict[str, Any] = {"w": 0.5, "scale": 2, "num_inference_steps": 1, "guidance_scale": 1.0, "start": "lq"}
    options |= {"color_fix": "wavelet", "prompt": None, "negative_prompt": None}
    return Restorer(
        Restoring(
            folder=out,
            settings={},
            model=str(model),
            device=torch.device("cpu"),
            dtype=torch.float32,
            seed=0,
            options=options,
            tiling=Tiling(),
            face_model=None,
            face_w=0.5,
            is_huge_allowed=False,
            is_compiled=False,
            resume=False,
            has_provenance=True,
        )
    )


def faces(job: Job) -> Told:
    """What `stablesr faces` does with each photo, without a background model."""
    stage = FaceRefinement(load_face_model("mini", torch.device("cpu")))
    return restore_photo(job, stage, resize_bicubic, 1.0, {}, save_crops=False)


if __name__ == "__main__":
    sys.exit(main())
