"""Compare a model at w = 0, 0.5 and 1 with bicubic and Lanczos enlargement, on 4x pairs whose truth is known.

    python -m benchmarks.quality --data DATA --json

DATA holds folders NAME_HR and NAME_LRx4 (Set5_HR, Set5_LRx4, ...) with the same pictures, the small ones under the
same name or with x4 appended; and, for NIQE, niqe_pris_params.npz in DATA or in DATA/../metrics. LPIPS and DISTS are
measured where --weights names the folder of their weights.
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


def main() -> None:
    """Print one JSON object: set -> method -> mean of each metric, and seconds per picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of NAME_HR and NAME_LRx4")
    parser.add_argument("--model", default="mini", help="name or folder of the pipeline")
    parser.add_argument("--steps", type=int, default=None, help="denoising steps; the model's own number if not given")
    parser.add_argument("--eta", type=float, default=0.0, help="noise of the steps")
    parser.add_argument("--seed", type=int, default=0, help="seed of every picture")
    parser.add_argument("--weights", type=Path, default=None, help="folder of the weights of LPIPS and DISTS")
    parser.add_argument("--sheets", type=Path, default=None, help="folder for a strip of all methods per picture")
    parser.add_argument("--json", action="store_true", help="print JSON; a table if not given")
    options = parser.parse_args()

    methods = {"bicubic": enlarge(Image.Resampling.BICUBIC), "lanczos": enlarge(Image.Resampling.LANCZOS)}
    pipeline = StableSRPipeline.from_pretrained(options.model)
    pipeline.set_progress_bar_config(disable=True)
    for w in (0.0, 0.5, 1.0):
        methods[f"w={w}"] = restorer(pipeline, w, options.steps, options.eta, options.seed)

    file = next(path for path in (options.data, options.data.parent / "metrics") if (path / NIQE_FILE).is_file())
    quality = Quality(str(file / NIQE_FILE), None if options.weights is None else str(options.weights))
    results = {
        folder.name.removesuffix("_HR"): evaluate(folder, methods, quality, options.sheets)
        for folder in sorted(options.data.glob("*_HR"))
    }
    if options.json:
        json.dump({"model": options.model, "border_px": BORDER_PX, "results": results}, sys.stdout, indent=1)
        sys.stdout.write("\n")
    else:
        for name, rows in results.items():
            for method, metrics in rows.items():
                print(f"{name:8} {method:8}", *(f"{key} {value:.4g}" for key, value in metrics.items()))


NIQE_FILE = "niqe_pris_params.npz"


def enlarge(resampling: Image.Resampling) -> Restorer:
    """Plain enlargement by four."""
    return lambda lq: lq.resize((lq.width * 4, lq.height * 4), resampling)


def restorer(pipeline: StableSRPipeline, w: float, steps: int | None, eta: float, seed: int) -> Restorer:
    """The pipeline with a fixed seed."""

    def restore(lq: Image.Image) -> Image.Image:
        generator = torch.Generator().manual_seed(seed)
        return pipeline(lq, w=w, num_inference_steps=steps, eta=eta, generator=generator).images[0]

    return restore


def evaluate(
    folder: Path, methods: dict[str, Restorer], quality: Quality, sheets: Path | None
) -> dict[str, dict[str, float]]:
    """Means over a folder's pictures, per method; `truth` is the undamaged picture itself."""
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in (*methods, "truth")}
    for file in sorted(folder.glob("*.png")):
        small = folder.with_name(folder.name.replace("_HR", "_LRx4"))
        lq = Image.open(next(path for path in small.glob(f"{file.stem}*.png"))).convert("RGB")
        truth = np.asarray(Image.open(file).convert("RGB"))[: lq.height * 4, : lq.width * 4]
        strip = []
        for name, restore in methods.items():
            start = time.perf_counter()
            restored = np.asarray(restore(lq))[: truth.shape[0], : truth.shape[1]]
            seconds = time.perf_counter() - start
            rows[name].append(quality(restored, truth) | {"gmsd": gmsd(restored, truth)} | {"seconds": seconds})
            strip.append(restored)
        rows["truth"].append(quality(truth, None))
        if sheets is not None:
            sheets.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.concatenate([*strip, truth], axis=1)).save(sheets / f"{folder.name}_{file.stem}.png")
    return {
        name: {key: float(np.nanmean([row[key] for row in metrics])) for key in metrics[0]}
        for name, metrics in rows.items()
    }


if __name__ == "__main__":
    main()
