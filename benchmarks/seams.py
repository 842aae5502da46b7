"""Whether the borders of the tiles show in the result.

python -m benchmarks.seams --json [--model mini] [--size 512 768] [--tile-px 256] [--overlap-px 8 16 32] [--steps N]
    [--jitter]

A smooth gradient and a photograph (scikit-image's astronaut) are restored in tiles. What the restoration added to the
bicubically enlarged picture is looked at, since the picture's own edges are no seams. It is averaged over blocks one
latent wide and 32 pixels long. Their excess is how much the step across a line between two columns (or rows) of latents
differs from the mean of the steps one latent before and behind; a seam is an excess that goes on along the line. The
energy of a line is the mean logarithm, along it, of the squared excess, which counts flat parts, where seams are seen,
as much as textured ones; less than a tenth of a level of 255 counts as a tenth. The statistic is the mean energy of the
lines where a tile of the last step ends, and of those in the middle of an overlap, where the blend changes fastest. It
is compared with the same statistic of 999 draws in which each of those lines is replaced by a line at random of the 24
nearest that are no border nor next to one: `ratio` is the energy at the borders over that elsewhere, `p` the
probability of such a high one by chance, `level` the typical excess elsewhere, in levels of 255.

Controls show what the test would find: `p_of_level` is that of the same result with hard tiles that differ by random
shifts with a standard deviation of two and four of 255 levels; and an overlap of 0 is restored as well. Prints one JSON
object.
"""

import argparse
import itertools
import json
import math
import random
import statistics
from typing import Any

import torch
import torch.nn.functional as F
from skimage import data
from torch import Tensor

from stablesr_kit import StableSRPipeline
from stablesr_kit.diffusion.canvas_noise import CanvasNoise
from stablesr_kit.imaging.canvas import Region, View, assembled
from stablesr_kit.imaging.resizing import resize_bicubic
from stablesr_kit.tiling.latents import Aggregation, choose_grid, merge, tile_multiple
from stablesr_kit.tiling.memory import Tiling

SEED = 0
DRAWS = 999
NEAREST_LINES = 24
SEGMENT_PX = 32
SMALLEST_LEVEL = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", required=True, help="print one JSON object")
    parser.add_argument("--model", default="mini")
    parser.add_argument("--size", type=int, nargs=2, default=(512, 768), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--tile-px", type=int, nargs="+", default=(256,))
    parser.add_argument("--overlap-px", type=int, nargs="+", default=(8, 16, 32))
    parser.add_argument("--steps", type=int, default=None, help="denoising steps; the model's own if not given")
    parser.add_argument("--jitter", action="store_true", help="move the tiles at every step")
    arguments = parser.parse_args()
    pipeline = StableSRPipeline.from_pretrained(arguments.model)
    pipeline.set_progress_bar_config(disable=True)
    height, width = arguments.size
    pictures = {"gradient": gradient(height // 4, width // 4), "photo": photo(height // 4, width // 4)}
    cases = []
    for (name, picture), tile_px, overlap_px in itertools.product(
        pictures.items(), arguments.tile_px, (0, *arguments.overlap_px)
    ):
        added, tiles = added_by_restoring(pipeline, picture, tile_px, overlap_px, arguments.jitter, arguments.steps)
        levels = {level: with_hard_tiles(added, tiles, level, pipeline.vae_scale_factor) for level in (2, 4)}
        case = {"picture": name, "tile_px": tile_px, "overlap_px": overlap_px}
        case |= seam_energy(added, tiles, pipeline.vae_scale_factor)
        case["p_of_level"] = {
            level: seam_energy(image, tiles, pipeline.vae_scale_factor)["p"] for level, image in levels.items()
        }
        cases.append(case)
    print(
        json.dumps({"size_px": [height, width], "steps": arguments.steps, "jitter": arguments.jitter, "cases": cases})
    )


def added_by_restoring(
    pipeline: StableSRPipeline, picture: Tensor, tile_px: int, overlap_px: int, jitter: bool, steps: int | None
) -> tuple[Tensor, list[Region]]:
    """Restored minus enlarged picture (1, 3, H, W), and the tiles of the last step, in latents."""
    restored = pipeline(
        picture,
        num_inference_steps=steps,
        tiling=Tiling(tile_px=tile_px, overlap_px=overlap_px, jitter=jitter),
        generator=torch.Generator().manual_seed(SEED),
        output_type="pt",
    ).images
    enlarged, canvas = pipeline.prepare_image(View(picture))
    size = canvas.shape[1] // pipeline.vae_scale_factor, canvas.shape[2] // pipeline.vae_scale_factor
    seed = CanvasNoise.from_generator(torch.Generator().manual_seed(SEED), 1).seeds[0]
    aggregation = Aggregation(
        size,
        choose_grid(pipeline.unet, *size, pipeline.vae_scale_factor, tile_px, overlap_px),
        tile_multiple(pipeline.unet),
        torch.device("cpu"),
        torch.float32,
        jitter_seed=seed if jitter else None,
    )
    return restored - assembled(enlarged).clamp(0, 1), aggregation.regions(pipeline.num_timesteps - 1)


def seam_energy(image: Tensor, tiles: list[Region], pixels_per_latent: int) -> dict[str, Any]:
    """How the lines where tiles (in latents) end or give way to each other compare with the other lines of an image."""
    columns = sorted({(tile.left, tile.right) for tile in tiles})
    rows = sorted({(tile.top, tile.bottom) for tile in tiles})
    at_borders: list[float] = []
    elsewhere: list[list[float]] = []  # per border line, its neighbours'
    for picture, spans in ((image, columns), (image.mT, rows)):
        energies = line_energies(picture, pixels_per_latent)
        borders = border_lines(spans)
        free = [line for line in energies if not borders & {line - 1, line, line + 1}]
        for line in sorted(borders & energies.keys()):
            at_borders.append(energies[line])
            nearest = sorted(free, key=lambda other: abs(other - line))[:NEAREST_LINES]
            elsewhere.append([energies[other] for other in nearest])
    if not at_borders:
        raise ValueError("the picture is one tile and has no border; give a smaller --tile-px")
    if not all(elsewhere):
        raise ValueError("every line is a border or next to one; give larger tiles or a smaller --overlap-px")
    observed = statistics.fmean(at_borders)
    rng = random.Random(SEED)
    drawn = [statistics.fmean(rng.choice(near) for near in elsewhere) for _ in range(DRAWS)]
    return {
        "border_lines": len(at_borders),
        "ratio": round(math.exp(observed - statistics.fmean(drawn)), 3),
        "level": round(255 * math.exp(statistics.fmean(drawn) / 2), 3),
        "p": (1 + sum(one >= observed for one in drawn)) / (DRAWS + 1),
    }


def with_hard_tiles(image: Tensor, tiles: list[Region], levels: float, pixels_per_latent: int) -> Tensor:
    """The image in [0, 1] with random shifts, in levels of 255, per channel and tile (in latents), not blended."""
    in_pixels = [Region(*(pixels_per_latent * edge for edge in tile)) for tile in tiles]
    shifts = torch.randn(len(tiles), 3, 1, 1, generator=torch.Generator().manual_seed(SEED)) * levels / 255
    patches = [one.expand(1, 3, tile.height, tile.width) for one, tile in zip(shifts, in_pixels, strict=True)]
    shifted = merge(in_pixels, patches, lambda height, width: torch.ones(height, width, dtype=torch.float64))
    return image + shifted[..., : image.shape[-2], : image.shape[-1]]


def border_lines(spans: list[tuple[int, int]]) -> set[int]:
    """Where tiles that span (start, end) of one side end, and the middle of what neighbours share."""
    lines = {edge for span in spans for edge in span}
    return lines | {(end + start) // 2 for (_, end), (start, _) in itertools.pairwise(spans)}


def line_energies(image: Tensor, pixels_per_latent: int) -> dict[int, float]:
    """Vertical line, counted in latents -> its energy, a logarithm."""
    blocks = F.avg_pool2d(image.double(), (min(SEGMENT_PX, image.shape[-2]), pixels_per_latent))
    steps = blocks.diff(dim=-1)
    excess = (steps[..., 1:-1] - (steps[..., :-2] + steps[..., 2:]) / 2).abs().clamp(min=SMALLEST_LEVEL / 255)
    return dict(enumerate((2 * excess.log()).mean(dim=(0, 1, 2)).tolist(), start=2))


def gradient(height: int, width: int) -> Tensor:
    """Colours (1, 3, height, width) in [0, 1] that change evenly along both sides."""
    rows = torch.linspace(0.1, 0.9, height)[:, None].expand(height, width)
    columns = torch.linspace(0.1, 0.9, width).expand(height, width)
    return torch.stack([rows, columns, 1 - (rows + columns) / 2])[None]


def photo(height: int, width: int) -> Tensor:
    """A photograph (1, 3, height, width) in [0, 1]."""
    picture = torch.from_numpy(data.astronaut()).permute(2, 0, 1)[None] / 255
    return resize_bicubic(picture, height, width).clamp(0, 1)


if __name__ == "__main__":
    main()
