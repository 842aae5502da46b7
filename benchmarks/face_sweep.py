"""Sweep CodeFormer's w over aligned faces: fidelity to the input, and closeness to the truth where it is known.

    python -m benchmarks.face_sweep --model DIR --faces FACES --degradation codeformer-256 --json
    python -m benchmarks.face_sweep --model DIR --faces LQ_FACES --json --plot sweep.svg

DIR is a CodeFormer network's folder. FACES are good faces, which the degradation damages, or, without one, faces that
are damaged already. With --vqgan, the folder of the VQGAN that the codes belong to, their accuracy is measured too.
"""

import argparse
import fnmatch
import json
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Generator, Tensor

from stablesr_kit.evaluation.metrics import PristineStatistics, niqe, psnr, ssim
from stablesr_kit.imaging.degradations import degrade, find_preset
from stablesr_kit.imaging.reading import read_picture
from stablesr_kit.models.codeformer import CodeFormer
from stablesr_kit.models.vqgan import VQGAN
from stablesr_kit.spaces import image_to_pixels, pixels_to_image
from stablesr_kit.training.data.sources import list_photos


class Face(NamedTuple):
    """A face as it is given, (1, 3, H, W) in [-1, 1], and the good one, where it is known."""

    name: str
    lq: Tensor
    hq: Tensor | None


def main() -> None:
    """Print one JSON object: method -> mean of each metric over the faces."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the CodeFormer network")
    parser.add_argument("--faces", type=Path, required=True, help="folder of aligned faces")
    parser.add_argument("--keep", nargs="*", default=["*"], help="patterns of the file names to use")
    parser.add_argument("--degradation", default=None, help="what damages them; damaged already if not given")
    parser.add_argument("--vqgan", default=None, help="folder of the VQGAN whose codes are the right ones")
    parser.add_argument("--niqe", type=Path, default=None, help="niqe_pris_params.npz, to measure naturalness")
    parser.add_argument("--w", nargs="*", type=float, default=[0.0, 0.25, 0.5, 0.75, 1.0], help="weights to sweep")
    parser.add_argument("--seed", type=int, default=0, help="seed of the damage")
    parser.add_argument("--plot", type=Path, default=None, help="file for a plot; needs matplotlib")
    parser.add_argument("--sheet", type=Path, default=None, help="file for a row of pictures per face")
    parser.add_argument("--json", action="store_true", help="print JSON; a table if not given")
    options = parser.parse_args()

    codeformer = CodeFormer.from_pretrained(options.model).eval()
    faces = load_faces(options, codeformer.config.image_size)
    pristine = None if options.niqe is None else PristineStatistics.load(options.niqe)
    methods = {f"w={w:g}": (w, "transformer") for w in options.w} | {
        f"nearest, w={w:g}": (w, "nearest") for w in (0, 1)
    }
    rows: dict[str, list[dict[str, float]]] = {"input": [], **{name: [] for name in methods}}
    strips = []
    for face in faces:
        given = image_to_pixels(face.lq)[0]
        strip = [given]
        rows["input"].append(measure(given, face, pristine))
        for name, (w, lookup) in methods.items():
            start = time.perf_counter()
            with torch.inference_mode():
                output = codeformer(face.lq, w, adain=True, code_lookup=lookup)
            seconds = time.perf_counter() - start
            restored = image_to_pixels(output.image)[0]
            rows[name].append(measure(restored, face, pristine) | {"seconds": seconds})
            strip.append(restored)
        if face.hq is not None:
            strip.append(image_to_pixels(face.hq)[0])
        strips.append(np.concatenate(strip, axis=1))

    results = {name: {key: float(np.mean([row[key] for row in own])) for key in own[0]} for name, own in rows.items()}
    report = {"model": options.model, "faces": len(faces), "degradation": options.degradation, "results": results}
    if options.vqgan is not None:
        report["code_accuracy"] = code_accuracy(codeformer, VQGAN.from_pretrained(options.vqgan).eval(), faces)
    if options.sheet is not None:
        Image.fromarray(np.concatenate(strips)).save(options.sheet)
    if options.plot is not None:
        plot(results, options.w, options.plot)
    if options.json:
        json.dump(report, sys.stdout, indent=1)
        sys.stdout.write("\n")
    else:
        for name, metrics in results.items():
            print(f"{name:14}", *(f"{key} {value:.4g}" for key, value in metrics.items()))


def load_faces(options: argparse.Namespace, size: int) -> list[Face]:
    """The chosen faces at the network's size, damaged if asked for; each by its own random numbers."""
    faces = []
    for number, path in enumerate(list_photos(options.faces)):
        if not any(fnmatch.fnmatch(path.name, pattern) for pattern in options.keep):
            continue
        picture = read_picture(path).rgb
        if picture.size != (size, size):
            picture = picture.resize((size, size), Image.Resampling.BICUBIC)
        image = pixels_to_image(np.asarray(picture))
        if options.degradation is None:
            faces.append(Face(path.stem, image, None))
        else:
            generator = Generator().manual_seed(options.seed + number)
            faces.append(Face(path.stem, degrade(image, find_preset(options.degradation), generator), image))
    if not faces:
        raise SystemExit(f"error: no face in {options.faces} is named like {', '.join(options.keep)}")
    return faces


def measure(pixels: NDArray[np.uint8], face: Face, pristine: PristineStatistics | None) -> dict[str, float]:
    """Every metric of one picture; what is identical counts 100 dB."""
    given = image_to_pixels(face.lq)[0]
    metrics = {"psnr_to_input": 100.0 if np.array_equal(pixels, given) else psnr(pixels, given, 0)}
    if face.hq is not None:
        truth = image_to_pixels(face.hq)[0]
        metrics |= {"psnr_y": psnr(pixels, truth, 0), "ssim": ssim(pixels, truth, 0)}
    if pristine is not None:
        metrics["niqe"] = niqe(pixels, pristine, 0)
    return metrics


@torch.inference_mode()
def code_accuracy(codeformer: CodeFormer, vqgan: VQGAN, faces: list[Face]) -> dict[str, float]:
    """Share of the codes of the good faces that are found from the damaged ones, by each way of looking them up."""
    found: dict[str, list[float]] = {"transformer": [], "nearest": []}
    for face in faces:
        if face.hq is None:
            raise SystemExit("error: --vqgan needs good faces and a --degradation")
        targets = vqgan.encode(face.hq).indices
        for lookup, shares in found.items():
            indices = codeformer(face.lq, code_only=True, code_lookup=lookup).indices
            shares.append(float((indices == targets).float().mean()))
    return {lookup: float(np.mean(shares)) for lookup, shares in found.items()}


def plot(results: dict[str, dict[str, float]], weights: list[float], file: Path) -> None:
    """Fidelity to the input, and closeness to the truth where it is known, over w."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SystemExit("error: --plot needs matplotlib; install it with `pip install matplotlib`") from error
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.subplots()
    for key, label in (("psnr_to_input", "to the input"), ("psnr_y", "to the truth")):
        if key in results[f"w={weights[0]:g}"]:
            axes.plot(weights, [results[f"w={w:g}"][key] for w in weights], marker="o", label=label)
    axes.set_xlabel("w")
    axes.set_ylabel("PSNR of the luma, dB")
    axes.legend()
    figure.savefig(file)


if __name__ == "__main__":
    main()
