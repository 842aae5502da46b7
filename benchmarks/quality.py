"""Compare a model at several w and numbers of steps with bicubic and Lanczos, on 4x pairs whose truth is known.

    python -m benchmarks.quality --data DATA --json                                        # at w = 0, 0.5 and 1
    python -m benchmarks.quality --data DATA --w 0.5 --steps 1 2 4 50 --weights WEIGHTS    # the table of few steps

DATA holds folders NAME_HR and NAME_LRx4 (Set5_HR, Set5_LRx4, ...) with the same pictures, the small ones under the
same name or with x4 appended; and, for NIQE, niqe_pris_params.npz in DATA or in DATA/../metrics. LPIPS (AlexNet) and
DISTS are measured where --weights names the folder of their weights. cpu_seconds are those of the processor.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from stablesr_kit.evaluation.metrics import BORDER_PX, gmsd
from stablesr_kit.evaluation.quality import Quality
from stablesr_kit.pipelines.stablesr import StableSRPipeline

Restorer = Callable[[Image.Image], Image.Image]
Row = dict[str, float]


def main() -> None:
    """Print one JSON object: set -> method -> mean of each metric, and seconds; "all" is of all pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of NAME_HR and NAME_LRx4")
    parser.add_argument("--model", default="mini", help="name or folder of the pipeline")
    parser.add_argument("--steps", type=int, nargs="+", help="numbers of denoising steps; the model's own if not given")
    parser.add_argument("--w", type=float, nargs="+", default=[0.0, 0.5, 1.0], help="fidelities")
    parser.add_argument("--limit", type=int, help="pictures per set; all if not given")
    parser.add_argument("--crop", type=int, help="side of the middle of the small pictures that is used, in pixels")
    parser.add_argument("--seed", type=int, default=0, help="seed of every picture")
    parser.add_argument("--weights", type=Path, default=None, help="folder of the weights of LPIPS and DISTS")
    parser.add_argument("--sheets", type=Path, default=None, help="folder for a strip of all methods per picture")
    parser.add_argument("--json", action="store_true", help="print JSON; a table if not given")
    options = parser.parse_args()

    methods = {"bicubic": enlarge(Image.Resampling.BICUBIC), "lanczos": enlarge(Image.Resampling.LANCZOS)}
    pipeline = StableSRPipeline.from_pretrained(options.model)
    pipeline.set_progress_bar_config(disable=True)
    for steps in options.steps or [None]:
        for w in options.w:
            name = f"w={w}" if steps is None else f"w={w} steps={steps}"
            methods[name] = restorer(pipeline, w, steps, options.seed)

    places = (options.data, options.data.parent / "metrics")
    file = next((path / NIQE_FILE for path in places if (path / NIQE_FILE).is_file()), None)
    if file is None:
        parser.error(f"{NIQE_FILE} is in neither of {', '.join(map(str, places))}; put it there")
    quality = Quality(str(file), None if options.weights is None else str(options.weights))
    pictures = {
        folder.name.removesuffix("_HR"): evaluate(folder, methods, quality, options.sheets, options.limit, options.crop)
        for folder in sorted(options.data.glob("*_HR"))
    }
    pictures["all"] = {name: [row for part in pictures.values() for row in part[name]] for name in (*methods, "truth")}
    results = {name: {method: means(rows) for method, rows in parts.items()} for name, parts in pictures.items()}
    if options.json:
        json.dump({"model": options.model, "border_px": BORDER_PX, "results": results}, sys.stdout, indent=1)
        sys.stdout.write("\n")
    else:
        for name, found in results.items():
            for method, metrics in found.items():
                print(f"{name:8} {method:16}", *(f"{key} {value:.4g}" for key, value in metrics.items()))


NIQE_FILE = "niqe_pris_params.npz"


def enlarge(resampling: Image.Resampling) -> Restorer:
    """Plain enlargement by four."""
    return lambda lq: lq.resize((lq.width * 4, lq.height * 4), resampling)


def restorer(pipeline: StableSRPipeline, w: float, steps: int | None, seed: int) -> Restorer:
    """The pipeline with a fixed seed."""

    def restore(lq: Image.Image) -> Image.Image:
        generator = torch.Generator().manual_seed(seed)
        return pipeline(lq, w=w, num_inference_steps=steps, generator=generator).images[0]

    return restore


def evaluate(
    folder: Path,
    methods: dict[str, Restorer],
    quality: Quality,
    sheets: Path | None = None,
    limit: int | None = None,
    crop: int | None = None,
) -> dict[str, list[Row]]:
    """The metrics of every picture, per method; `truth` is the undamaged picture itself."""
    rows: dict[str, list[Row]] = {name: [] for name in (*methods, "truth")}
    for file in sorted(folder.glob("*.png"))[:limit]:
        small = folder.with_name(folder.name.replace("_HR", "_LRx4"))
        lq = Image.open(next(path for path in small.glob(f"{file.stem}*.png"))).convert("RGB")
        side_x, side_y = (min(crop or side, side) for side in lq.size)
        left, top = (lq.width - side_x) // 2, (lq.height - side_y) // 2
        lq = lq.crop((left, top, left + side_x, top + side_y))
        truth = np.asarray(Image.open(file).convert("RGB"))[4 * top :, 4 * left :][: lq.height * 4, : lq.width * 4]
        strip = []
        for name, restore in methods.items():
            start, processor = time.perf_counter(), time.process_time()
            restored = np.asarray(restore(lq))[: truth.shape[0], : truth.shape[1]]
            took = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - processor}
            rows[name].append(quality(restored, truth) | {"gmsd": gmsd(restored, truth)} | took)
            strip.append(restored)
        rows["truth"].append(quality(truth, None))
        if sheets is not None:
            sheets.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.concatenate([*strip, truth], axis=1)).save(sheets / f"{folder.name}_{file.stem}.png")
    return rows


def means(rows: list[Row]) -> Row:
    """Mean of each metric over the pictures that have it: one may be infinite, or undefined for a small picture."""
    keys = dict.fromkeys(key for row in rows for key in row)
    return {key: float(np.mean([row[key] for row in rows if key in row])) for key in keys}


if __name__ == "__main__":
    main()
