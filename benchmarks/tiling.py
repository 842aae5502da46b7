"""The tiled autoencoder against diffusers' own tiling on the same weights: error, time, peak memory; and its growth.

python -m benchmarks.tiling --json [--size 512 768] [--tile-px 256 512] [--growth 1 4 9 24] [--folder DIR]

Encodes and decodes one random smooth picture with `mini` and with a random autoencoder that has attention: untiled, in
tiles of each size by the exact and the approximate mode, and by diffusers' enable_tiling. The errors are the largest
and the mean difference from the untiled result. Every row is a process of its own; added_mb is what its resident memory
grew by at most while it worked, feature maps included. Each point of --growth takes a picture of that many megapixels
through encoder, decoder and CFW of mini, with canvases in --folder and tiles of the first size; its peak_rss_mb counts
everything, torch included. Prints one JSON object.
"""

import argparse
import itertools
import json
import math
import tempfile
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from benchmarks.memory import in_fresh_process, peak_rss_mb, rss_mb
from benchmarks.timing import seconds
from stablesr_kit import StableSRPipeline
from stablesr_kit.imaging.canvas import Canvas
from stablesr_kit.models.feature_wrapping import scale_factor
from stablesr_kit.spaces import unit_to_image
from stablesr_kit.tiling.autoencoder import TiledAutoencoder, TilingMode

Method = Literal["exact", "approximate", "diffusers"]
VaeName = Literal["mini", "with_attention"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", required=True, help="print one JSON object")
    parser.add_argument("--size", type=int, nargs=2, default=(512, 768), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--tile-px", type=int, nargs="+", default=(256,))
    parser.add_argument("--vae", choices=get_args(VaeName), nargs="+", default=get_args(VaeName))
    parser.add_argument("--growth", type=int, nargs="*", default=[], metavar="MEGAPIXELS")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    arguments = parser.parse_args()
    result = {
        "size_px": arguments.size,
        "threads": torch.get_num_threads(),
        "comparison": [row for vae in arguments.vae for row in comparison(vae, arguments.size, arguments.tile_px)],
        "growth": [
            in_fresh_process(growth_point, mode, megapixels, arguments.tile_px[0], arguments.folder)
            for mode in get_args(TilingMode)
            for megapixels in arguments.growth
        ],
    }
    print(json.dumps(result))


def comparison(vae: VaeName, size: tuple[int, int], tiles_px: list[int]) -> list[dict[str, Any]]:
    """A row for the untiled autoencoder, and one for each method and tile size."""
    with tempfile.TemporaryDirectory() as name:
        results = Path(name) / "untiled.pt"
        rows = [{"vae": vae, "method": "untiled", **in_fresh_process(untiled, vae, size, results)}]
        for method, tile_px in itertools.product(get_args(Method), tiles_px):
            measured = in_fresh_process(tiled, vae, method, size, tile_px, results)
            rows.append({"vae": vae, "method": method, "tile_px": tile_px, **measured})
    return rows


@torch.no_grad()
def untiled(name: VaeName, size: tuple[int, int], results: Path) -> dict[str, float]:
    """Seconds and memory without tiles; moments and decoded mean are left in a file."""
    vae, image = autoencoder(name), smooth_picture(*size)
    found: list[Tensor] = []

    def work() -> None:
        found.append(vae.encode(image).latent_dist.parameters)
        found.append(vae.decode(found[0].chunk(2, dim=1)[0]).sample)

    measured = measure(work)
    torch.save(found, results)
    return measured


@torch.no_grad()
def tiled(name: VaeName, method: Method, size: tuple[int, int], tile_px: int, results: Path) -> dict[str, float]:
    """Error against the untiled results, seconds and memory of one way to tile."""
    vae, image = autoencoder(name), smooth_picture(*size)
    expected = torch.load(results)
    z = expected[0].chunk(2, dim=1)[0]
    found: list[Tensor] = []

    def work() -> None:
        if method == "diffusers":
            vae.enable_tiling()
            vae.tile_sample_min_size = tile_px
            vae.tile_latent_min_size = tile_px // scale_factor(vae)
            found.extend((vae.encode(image).latent_dist.parameters, vae.decode(z).sample))
        else:
            coder = TiledAutoencoder(vae, tile_px=tile_px, mode=method)
            found.extend((coder.encode(image).to_tensor(), coder.decode(z).to_tensor()))

    measured = measure(work)
    differences = [(one - other).abs() for one, other in zip(found, expected, strict=True)]
    return {
        "encode_max_error": differences[0].max().item(),
        "encode_mean_error": differences[0].mean().item(),
        "decode_max_error": differences[1].max().item(),
        "decode_mean_error": differences[1].mean().item(),
        **measured,
    }


def measure(work: Any) -> dict[str, float]:
    """Seconds of one call, and by how many megabytes the process grew at most."""
    before = rss_mb()
    took = seconds(work)
    return {"seconds": round(took, 2), "added_mb": max(peak_rss_mb() - before, 0)}


@torch.no_grad()
def growth_point(mode: TilingMode, megapixels: int, tile_px: int, folder: Path) -> dict[str, Any]:
    """Seconds and peak memory of encoder, decoder and CFW of `mini` for a picture of 2 : 3."""
    pipeline = StableSRPipeline.from_pretrained("mini")
    height, width = (round(math.sqrt(megapixels * 2**20 * ratio) / 8) * 8 for ratio in (2 / 3, 3 / 2))
    image = Canvas.from_tensor(smooth_picture(height, width), folder)
    coder = TiledAutoencoder(pipeline.vae, pipeline.cfw, tile_px=tile_px, mode=mode, folder=folder)

    def run() -> None:
        moments, features = coder.encode_with_features(image, tuple(pipeline.cfw.config.levels))
        coder.decode(moments.to_tensor().chunk(2, dim=1)[0], features, 0.5)

    took = seconds(run)
    return {
        "mode": mode,
        "tile_px": tile_px,
        "height_px": height,
        "width_px": width,
        "seconds": round(took, 1),
        "seconds_per_megapixel": round(took / (height * width / 2**20), 2),
        "peak_rss_mb": peak_rss_mb(),
    }


def smooth_picture(height: int, width: int) -> Tensor:
    """Random colours (1, 3, height, width) in [-1, 1] that change over some 32 pixels, the same for the same size."""
    coarse = torch.rand(1, 3, height // 32 + 2, width // 32 + 2, generator=torch.Generator().manual_seed(0))
    return unit_to_image(F.interpolate(coarse, (height, width), mode="bilinear"))


def autoencoder(name: VaeName) -> AutoencoderKL:
    """That of mini, or random weights with attention: a factor of 8 as in Stable Diffusion, narrower."""
    if name == "mini":
        return StableSRPipeline.from_pretrained("mini").vae
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoencoderKL(
            block_out_channels=(16, 32, 64, 64),
            norm_num_groups=8,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        ).eval()


if __name__ == "__main__":
    main()
