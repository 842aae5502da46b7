"""Whether the borders of the tiles show in the result.

python -m benchmarks.seams --json [--model mini] [--size 512 768] [--tile-px 256] [--overlap 8 16 32] [--steps N]

A smooth gradient and a photograph (scikit-image's astronaut) are restored in tiles, overlaps given in latents, with the
tiles in place and with tile jitter. What the restoration added to the bicubically enlarged picture is looked at, since
the picture's own edges are no seams. The energy of a line between two rows or columns of pixels is the mean over its
length of how much the step across it differs from the mean of the two steps beside it, relative to the energy of the
four nearest lines of the same kind. Lines between latents are compared with each other: the lines where a tile of the
last step ends, and those in the middle of an overlap, where the blend changes fastest, with all the others. Per case:
the mean quantile of the border lines among the others (0.5 if they are like them, 1 if all stand out) and the
probability of one as high or higher by chance (Mann and Whitney 1947). An overlap of 0 shows what seams look like.
Prints one JSON object.
"""

import argparse
import itertools
import json
from typing import Any

import torch
from scipy.stats import mannwhitneyu
from skimage import data
from torch import Tensor

from stablesr_kit import StableSRPipeline
from stablesr_kit.diffusion.canvas_noise import CanvasNoise
from stablesr_kit.imaging.canvas import Region, View, assembled
from stablesr_kit.imaging.resizing import resize_bicubic
from stablesr_kit.pipelines.aggregation import Aggregation
from stablesr_kit.pipelines.planner import choose_tiling, tile_multiple

SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", required=True, help="print one JSON object")
    parser.add_argument("--model", default="mini")
    parser.add_argument("--size", type=int, nargs=2, default=(512, 768), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--tile-px", type=int, nargs="+", default=(256,))
    parser.add_argument("--overlap", type=int, nargs="+", default=(8, 16, 32), help="in latents")
    parser.add_argument("--steps", type=int, default=None, help="denoising steps; the model's own if not given")
    arguments = parser.parse_args()
    pipeline = StableSRPipeline.from_pretrained(arguments.model)
    pipeline.set_progress_bar_config(disable=True)
    height, width = arguments.size
    pictures = {"gradient": gradient(height // 4, width // 4), "photo": photo(height // 4, width // 4)}
    cases = []
    for (name, picture), tile_px, overlap, jitter in itertools.product(
        pictures.items(), arguments.tile_px, arguments.overlap, (False, True)
    ):
        overlap_px = overlap * pipeline.vae_scale_factor
        added, tiles = added_by_restoring(pipeline, picture, tile_px, overlap_px, jitter, arguments.steps)
        case = {"picture": name, "tile_px": tile_px, "overlap_latents": overlap, "tile_jitter": jitter}
        cases.append({**case, **seam_energy(added, tiles, pipeline.vae_scale_factor)})
    print(json.dumps({"size_px": [height, width], "steps": arguments.steps, "cases": cases}))


def added_by_restoring(
    pipeline: StableSRPipeline, picture: Tensor, tile_px: int, overlap_px: int, jitter: bool, steps: int | None
) -> tuple[Tensor, list[Region]]:
    """Restored minus enlarged picture (1, 3, H, W), and the tiles of the last step, in latents."""
    restored = pipeline(
        picture,
        num_inference_steps=steps,
        tile_px=tile_px,
        overlap_px=overlap_px,
        tile_jitter=jitter,
        generator=torch.Generator().manual_seed(SEED),
        output_type="pt",
    ).images
    padded = pipeline.pad(View(restored))
    size = padded.shape[1] // pipeline.vae_scale_factor, padded.shape[2] // pipeline.vae_scale_factor
    seed = CanvasNoise.from_generator(torch.Generator().manual_seed(SEED), 1).seeds[0]
    aggregation = Aggregation(
        size,
        choose_tiling(pipeline.unet, *size, pipeline.vae_scale_factor, tile_px, overlap_px),
        tile_multiple(pipeline.unet),
        torch.device("cpu"),
        torch.float32,
        jitter_seed=seed if jitter else None,
    )
    enlarged = assembled(pipeline.upsample(View(picture))).clamp(0, 1)
    return restored - enlarged, aggregation.regions(pipeline.num_timesteps - 1)


def seam_energy(image: Tensor, tiles: list[Region], pixels_per_latent: int) -> dict[str, Any]:
    """How the lines where tiles (in latents) end or give way to each other rank among the other lines of an image."""
    columns = sorted({(tile.left, tile.right) for tile in tiles})
    rows = sorted({(tile.top, tile.bottom) for tile in tiles})
    at_borders: list[float] = []
    elsewhere: list[float] = []
    for picture, spans in ((image, columns), (image.mT, rows)):
        energies = line_energies(picture, pixels_per_latent)
        borders = border_lines(spans)
        for line, energy in energies.items():
            (at_borders if line in borders else elsewhere).append(energy)
    if not at_borders:
        raise ValueError("the picture is one tile and has no border; give a smaller --tile-px")
    test = mannwhitneyu(at_borders, elsewhere, alternative="greater")
    quantile = float(test.statistic) / (len(at_borders) * len(elsewhere))
    return {"border_lines": len(at_borders), "border_quantile": round(quantile, 3), "p": round(float(test.pvalue), 4)}


def border_lines(spans: list[tuple[int, int]]) -> set[int]:
    """Where tiles that span (start, end) of one side end, and the middle of what neighbours share."""
    lines = {edge for span in spans for edge in span}
    return lines | {(end + start) // 2 for (_, end), (start, _) in itertools.pairwise(spans)}


def line_energies(image: Tensor, spacing: int) -> dict[int, float]:
    """Line -> energy of the step across it, relative to its neighbours; vertical lines, at multiples of `spacing`."""
    steps = image.double().diff(dim=-1)
    excess = (steps[..., 1:-1] - (steps[..., :-2] + steps[..., 2:]) / 2).abs().mean(dim=(0, 1, 2))
    energies = excess[spacing - 2 :: spacing]  # excess[i] is that of the line between pixels i + 1 and i + 2
    return {
        i + 1: (energies[i] / torch.cat([energies[i - 2 : i], energies[i + 1 : i + 3]]).mean()).item()
        for i in range(2, len(energies) - 2)
    }


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
