"""The tiled autoencoder against diffusers' own tiling: error and time on the same weights; growth of memory and time.

python -m benchmarks.tiling --json [--size 512 768] [--tile-px 256] [--growth 1 4 9 24] [--folder DIR]

Encodes and decodes one random smooth picture with `mini` and with a random autoencoder that has attention. The errors
are the largest and the mean difference from the untiled result. Each point of --growth is a process of its own, which
takes a picture of that many megapixels through encoder, decoder and CFW, with canvases in --folder; its peak resident
memory counts everything, torch included. Prints one JSON object.
"""

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from benchmarks.timing import seconds
from stablesr_kit import StableSRPipeline
from stablesr_kit.imaging.canvas import Canvas
from stablesr_kit.pipelines.tiled_autoencoder import TiledAutoencoder, TilingMode

MODES: tuple[TilingMode, ...] = ("exact", "approximate")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", required=True, help="print one JSON object")
    parser.add_argument("--size", type=int, nargs=2, default=(512, 768), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--tile-px", type=int, default=256)
    parser.add_argument("--growth", type=int, nargs="*", default=[], metavar="MEGAPIXELS")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--point", nargs=2, metavar=("MODE", "MEGAPIXELS"), help="one point of --growth")
    arguments = parser.parse_args()
    if arguments.point:
        mode, megapixels = arguments.point
        print(json.dumps(growth_point(mode, int(megapixels), arguments.tile_px, arguments.folder)))
        return
    height, width = arguments.size
    vaes = {"mini": StableSRPipeline.from_pretrained("mini").vae, "with_attention": vae_with_attention()}
    result: dict[str, Any] = {
        "size_px": arguments.size,
        "tile_px": arguments.tile_px,
        "threads": torch.get_num_threads(),
        "comparison": {name: comparison(vae, height, width, arguments.tile_px) for name, vae in vaes.items()},
    }
    options = ["--json", "--tile-px", str(arguments.tile_px), "--folder", str(arguments.folder)]
    result["growth"] = [
        json.loads(
            subprocess.run(
                [sys.executable, "-m", "benchmarks.tiling", *options, "--point", mode, str(megapixels)],
                check=True,
                capture_output=True,
            ).stdout
        )
        for mode in MODES
        for megapixels in arguments.growth
    ]
    print(json.dumps(result))


@torch.no_grad()
def comparison(vae: AutoencoderKL, height: int, width: int, tile_px: int) -> dict[str, dict[str, float]]:
    """Largest and mean error of moments and picture, and seconds, of each way to tile."""
    image = smooth_picture(height, width)
    moments = vae.encode(image).latent_dist.parameters
    z = moments.chunk(2, dim=1)[0]
    expected = vae.decode(z).sample
    result = {"untiled": {"seconds": round(seconds(lambda: vae.decode(vae.encode(image).latent_dist.mean)), 2)}}

    def add(name: str, encode: Any, decode: Any) -> None:
        found: list[Tensor] = []
        took = seconds(lambda: found.extend((encode(), decode())))
        differences = [(found[0] - moments).abs(), (found[1] - expected).abs()]
        result[name] = {
            "encode_max_error": differences[0].max().item(),
            "encode_mean_error": differences[0].mean().item(),
            "decode_max_error": differences[1].max().item(),
            "decode_mean_error": differences[1].mean().item(),
            "seconds": round(took, 2),
        }

    for mode in MODES:
        tiled = TiledAutoencoder(vae, tile_px=tile_px, mode=mode)
        add(mode, lambda tiled=tiled: tiled.encode(image).to_tensor(), lambda tiled=tiled: tiled.decode(z).to_tensor())
    vae.enable_tiling()
    vae.tile_sample_min_size = tile_px
    vae.tile_latent_min_size = tile_px // 2 ** (len(vae.config.block_out_channels) - 1)
    add("diffusers", lambda: vae.encode(image).latent_dist.parameters, lambda: vae.decode(z).sample)
    vae.disable_tiling()
    return result


@torch.no_grad()
def growth_point(mode: TilingMode, megapixels: int, tile_px: int, folder: Path) -> dict[str, Any]:
    """Seconds and peak memory of encoder, decoder and CFW of `mini` for a picture of 2 : 3."""
    pipeline = StableSRPipeline.from_pretrained("mini")
    height, width = (round(math.sqrt(megapixels * 2**20 * ratio) / 8) * 8 for ratio in (2 / 3, 3 / 2))
    image = Canvas.from_tensor(smooth_picture(height, width), folder)
    tiled = TiledAutoencoder(pipeline.vae, pipeline.cfw, tile_px=tile_px, mode=mode, folder=folder)

    def run() -> None:
        moments, features = tiled.encode_with_features(image, tuple(pipeline.cfw.config.levels))
        tiled.decode(moments.to_tensor().chunk(2, dim=1)[0], features, 0.5)

    took = seconds(run)
    return {
        "mode": mode,
        "height_px": height,
        "width_px": width,
        "seconds": round(took, 1),
        "seconds_per_megapixel": round(took / (height * width / 2**20), 2),
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def smooth_picture(height: int, width: int) -> Tensor:
    """Random colours (1, 3, height, width) in [-1, 1] that change over some 32 pixels, the same for the same size."""
    coarse = torch.rand(1, 3, height // 32 + 2, width // 32 + 2, generator=torch.Generator().manual_seed(0))
    return F.interpolate(coarse, (height, width), mode="bilinear") * 2 - 1


def vae_with_attention() -> AutoencoderKL:
    """Random weights; a factor of 8 as in Stable Diffusion, narrower."""
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
