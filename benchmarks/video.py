"""How steady a model's clips are on every rung of the ladder, beside bicubic enlargement, with the exact flow.

    python -m benchmarks.video --json [--photos FILE_OR_FOLDER ...] [--weights FOLDER]

Each clip pans and zooms over a photograph of its own by a known path, is made small and damaged frame by frame, and is
restored. E_warp is along the exact flow, times 1000 (Lai et al. 2018); a blurrier method wins it, so sharpness (mean
gradient, in levels), PSNR and LPIPS (with --weights) stand beside it, and what the truth itself has: no method is
steadier. `default` says what the default rung changes against fresh noise for every frame, and whether that is what is
asked of it. --pictures writes a strip of frames and an x-t slice of every method.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from skimage import data
from torch import Tensor

from stablesr_kit.cli.restorer import load_pipeline
from stablesr_kit.evaluation.metrics import LPIPS, Weights, psnr
from stablesr_kit.imaging.degradations.draws import add_gaussian_noise
from stablesr_kit.imaging.degradations.jpeg import jpeg
from stablesr_kit.imaging.resizing import resize_bicubic
from stablesr_kit.pipelines.video import LADDER, StableSRVideo, Steadiness
from stablesr_kit.spaces import image_to_pixels, image_to_unit, pixels_to_image, unit_to_image
from stablesr_kit.video.motion import Motion, warping_error

SPEEDS = {"slow": 0.3, "middle": 2.0, "fast": 9.0, "cut": 2.0}
"""Kinds of clips: pixels of the result that they move per frame; the last one has a cut in the middle."""
SCALE = 4
BUNDLED = ("chelsea.png", "coffee.png", "astronaut.png", "rocket.jpg", "hubble_deep_field.jpg")
"""Photographs that come with scikit-image."""
DEFAULT = next(name for name, steadiness in LADDER.items() if steadiness == Steadiness())
ASKED = {"e_warp": -0.4, "sharpness": -0.03, "psnr": -0.1}
"""Of the default against fresh noise: at most this change of E_warp, at least these of sharpness and PSNR (dB)."""


@dataclass(frozen=True)
class Clip:
    """truth: frames (3, H, W) in [-1, 1]; lq: the same, small and damaged; flows: exact, of each frame to the one
    before; None for the first and at the cut; photos: names of the files."""

    truth: list[Tensor]
    lq: list[Tensor]
    flows: list[Tensor | None]
    photos: list[str]


def main() -> None:
    """Print one JSON object, or a table: clip -> method -> figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--photos",
        type=Path,
        nargs="+",
        default=None,
        help="photographs, or folders of them: each clip takes the next ones that are larger than its pan; those of "
        "scikit-image if not given",
    )
    parser.add_argument("--model", default="mini", help="name or folder of the pipeline")
    parser.add_argument("--steps", type=int, default=None, help="denoising steps; the model's own number if not given")
    parser.add_argument("--w", type=float, default=None, help="fidelity; the model's own if not given")
    parser.add_argument("--frames", type=int, default=12, help="of each clip")
    parser.add_argument("--side", type=int, default=256, help="of the frames of the result, in pixels")
    parser.add_argument("--clips", nargs="*", default=list(SPEEDS), choices=list(SPEEDS), help="which kinds of clips")
    parser.add_argument("--rounds", type=int, default=1, help="clips of each kind")
    parser.add_argument("--rungs", nargs="*", default=list(LADDER), choices=list(LADDER), help="which rungs")
    parser.add_argument("--weights", type=Path, default=None, help="folder of the weights of LPIPS")
    parser.add_argument("--pictures", type=Path, default=None, help="folder for strips and x-t slices")
    parser.add_argument("--json", action="store_true", help="print JSON; a table if not given")
    options = parser.parse_args()

    pipeline = load_pipeline(options.model, torch.device("cpu"), torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    steps = options.steps or pipeline.default_steps
    rungs = [rung for rung in options.rungs if twin_of(rung, steps) not in options.rungs]
    lpips = None if options.weights is None else LPIPS(Weights((options.weights,)), "alex")
    photos = Photos(options.photos or [Path(data.__file__).parent / name for name in BUNDLED])
    begun, results = time.process_time(), {}
    for name in [kind if i == 0 else f"{kind}-{i + 1}" for i in range(options.rounds) for kind in options.clips]:
        clip = make_clip(photos, name, options.frames, options.side)
        shown = {"truth": clip.truth, "bicubic": [enlarged(frame) for frame in clip.lq]}
        rows = {method: figures(frames, clip, lpips) for method, frames in shown.items()}
        for rung in rungs:
            video = StableSRVideo(pipeline, LADDER[rung])
            start = time.process_time()
            given = [image_to_unit(frame[None]) for frame in clip.lq]
            chunks = list(video.chunks(given, w=options.w, num_inference_steps=steps))
            restored = [frame for chunk in chunks for frame in chunk.frames]
            taken = time.process_time() - start
            shown[rung] = [frame.image for frame in restored]
            rows[rung] = figures(shown[rung], clip, lpips) | {
                "cpu_seconds_per_frame": round(taken / len(restored), 3),
                "cuts": [i for i, frame in enumerate(restored) if frame.is_cut],
            }
        results[name] = {"photos": clip.photos, "rows": rows}
        if {"none", DEFAULT} <= set(rungs):
            results[name]["default"] = compared(rows[DEFAULT], rows["none"])
        if options.pictures is not None:
            draw(shown, options.pictures, name)
        if not options.json:
            for method, row in rows.items():
                print(f"{name:9} {method:13}", *(f"{key} {value}" for key, value in row.items()), flush=True)
            print(f"{name:9}", results[name].get("default", ""), flush=True)
    if options.json:
        twins = {rung: twin_of(rung, steps) for rung in options.rungs if rung not in rungs}
        made = {"model": options.model, "steps": steps, "scale": SCALE, "side": options.side, "frames": options.frames}
        made |= {"margin_px": pipeline.config.margin_px, "same_as": twins, "default_rung": DEFAULT}
        json.dump(made | {"cpu_seconds": round(time.process_time() - begun, 1), "clips": results}, sys.stdout, indent=1)
        sys.stdout.write("\n")


def twin_of(rung: str, steps: int) -> str | None:
    """The rung that does the same in so many steps, since none of them mixes latents; None if there is none."""
    steadiness = LADDER[rung]
    if steadiness.latents == 0 or steadiness.steps(steps):
        return None
    return next(name for name, other in LADDER.items() if other == replace(steadiness, latents=0.0))


def compared(row: dict[str, Any], baseline: dict[str, Any]) -> dict[str, Any]:
    """What changes against the baseline: shares of E_warp and sharpness, dB of PSNR; and whether it is as asked."""
    change = {name: round(row[name] / baseline[name] - 1, 4) for name in ("e_warp", "sharpness")}
    change["psnr"] = round(row["psnr"] - baseline["psnr"], 3)
    is_as_asked = change["e_warp"] <= ASKED["e_warp"] and all(change[it] >= ASKED[it] for it in ("sharpness", "psnr"))
    return change | {"is_as_asked": is_as_asked}


class Photos:
    """Photographs, each of them given once, in the order of the files and folders."""

    def __init__(self, given: Sequence[Path]) -> None:
        self.given = given
        self.left = [
            file
            for path in given
            for file in (sorted(path.iterdir()) if path.is_dir() else [path])
            if file.suffix in (".png", ".jpg")
        ]

    def next(self, side: int) -> Path:
        """The next one with `side` pixels or more on each side."""
        for file in self.left:
            with Image.open(file) as image:
                if min(image.size) >= side:
                    self.left.remove(file)
                    return file
        names = ", ".join(map(str, self.given))
        raise SystemExit(f"{names}: no further photograph of {side} pixels or more on each side; give more of them")


def make_clip(photos: Photos, name: str, frames: int, side: int) -> Clip:
    """A pan of the kind's speed with a slow zoom, over one photograph or, with a cut, over two."""
    kind, _, number = name.partition("-")
    speed, has_cut = SPEEDS[kind], kind == "cut"
    cut = frames // 2 if has_cut else frames
    files = [photos.next(math.ceil(side + speed * frames + 16)) for _ in range(1 + has_cut)]
    truth: list[Tensor] = []
    flows: list[Tensor | None] = []
    before: tuple[Tensor, float] | None = None
    for i in range(frames):
        if i == cut:
            before = None
        photo = pixels_to_image(np.asarray(Image.open(files[i >= cut]).convert("RGB")))
        distance = speed * i
        corner = torch.tensor([8 + 0.8 * distance, 8 + 0.6 * distance])
        zoom = 1 - 0.0005 * distance
        truth.append(seen(photo, corner, zoom, side))
        flows.append(None if before is None else exact_flow(corner, zoom, *before, side))
        before = corner, zoom
    noise = torch.Generator().manual_seed(list(SPEEDS).index(kind) + len(SPEEDS) * int(number or 0))
    return Clip(truth, [damaged(frame, noise) for frame in truth], flows, [file.name for file in files])


def seen(photo: Tensor, corner: Tensor, zoom: float, side: int) -> Tensor:
    """What a frame shows whose pixel p is the photo's pixel corner + zoom * p, (across, down)."""
    _, _, height, width = photo.shape
    at = torch.arange(side) * zoom
    x = ((corner[0] + at) * 2 / (width - 1) - 1).expand(side, side)
    y = ((corner[1] + at) * 2 / (height - 1) - 1)[:, None].expand(side, side)
    return F.grid_sample(photo, torch.stack([x, y], -1)[None], "bicubic", align_corners=True)[0].clamp(-1, 1)


def exact_flow(corner: Tensor, zoom: float, corner_before: Tensor, zoom_before: float, side: int) -> Tensor:
    """Flow (2, H, W) of a frame to the one before."""
    at = torch.arange(side).float()
    x, y = ((corner[i] + zoom * at - corner_before[i]) / zoom_before - at for i in (0, 1))
    return torch.stack([x.expand(side, side), y[:, None].expand(side, side)])


def damaged(frame: Tensor, noise: torch.Generator) -> Tensor:
    """A frame made small, with noise of two levels and JPEG artefacts that differ from frame to frame."""
    small = image_to_unit(resize_bicubic(frame[None], frame.shape[1] // SCALE, frame.shape[2] // SCALE))
    noisy = add_gaussian_noise(small, torch.tensor([2.0 / 255]), torch.tensor([False]), noise)
    return unit_to_image(jpeg(noisy.clamp(0, 1), 80.0).clamp(0, 1))[0]


def enlarged(frame: Tensor) -> Tensor:
    """Bicubic enlargement."""
    return resize_bicubic(frame[None], frame.shape[1] * SCALE, frame.shape[2] * SCALE)[0]


def figures(frames: list[Tensor], clip: Clip, lpips: Callable[..., float] | None) -> dict[str, Any]:
    """Means over a clip's frames; E_warp over its pairs."""
    errors = [
        warping_error(frames[i].clamp(-1, 1), frames[i - 1].clamp(-1, 1), Motion(flow, flow, valid_inside(flow)))
        for i, flow in enumerate(clip.flows)
        if flow is not None
    ]
    pixels = [image_to_pixels(frame[None])[0] for frame in frames]
    truth = [image_to_pixels(frame[None])[0] for frame in clip.truth]
    row = {
        "e_warp": round(1000 * float(np.mean([error for error in errors if error is not None])), 3),
        "sharpness": round(float(np.mean([sharpness(one) for one in pixels])), 3),
    }
    if frames is not clip.truth:
        row["psnr"] = round(float(np.mean([psnr(*pair, SCALE) for pair in zip(pixels, truth, strict=True)])), 3)
        if lpips is not None:
            row["lpips"] = round(float(np.mean([lpips(*pair) for pair in zip(pixels, truth, strict=True)])), 4)
    return row


def valid_inside(flow: Tensor) -> Tensor:
    """1 where a flow points into the picture, 0 elsewhere, (H, W)."""
    _, height, width = flow.shape
    x = torch.arange(width) + flow[0]
    y = torch.arange(height)[:, None] + flow[1]
    return ((x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)).float()


def sharpness(pixels: np.ndarray) -> float:
    """Mean length of the gradient of luma, in levels per pixel."""
    luma = pixels.astype(np.float64) @ (0.299, 0.587, 0.114)
    across, down = np.diff(luma, axis=1)[:-1], np.diff(luma, axis=0)[:, :-1]
    return float(np.hypot(across, down).mean())


def draw(shown: dict[str, list[Tensor]], folder: Path, name: str) -> None:
    """A row of frames per method, and under each other the x-t slices: row y of every frame, frames from above."""
    folder.mkdir(parents=True, exist_ok=True)
    strips, slices = [], []
    for frames in shown.values():
        pixels = [image_to_pixels(frame[None])[0] for frame in frames]
        side = len(pixels[0])
        middle = slice(side // 4, 3 * side // 4)
        strips.append(np.concatenate([one[middle, middle] for one in pixels[:4]], axis=1))
        slices.append(np.stack([one[side // 2] for one in pixels]).repeat(4, axis=0))
    gap = np.full((3, strips[0].shape[1], 3), 255, np.uint8)
    Image.fromarray(np.concatenate([part for strip in strips for part in (strip, gap)])).save(
        folder / f"{name}_frames.png"
    )
    gap = np.full((3, slices[0].shape[1], 3), 255, np.uint8)
    Image.fromarray(np.concatenate([part for one in slices for part in (one, gap)])).save(folder / f"{name}_xt.png")


if __name__ == "__main__":
    main()
