"""Time and memory of one large restoration with the embedded model.

python -m benchmarks.upscale --json [--size 4096 6144] [--w 0.5] [--tile 512] [--overlap 128]

A random smooth picture enlarged four times to the given height and width. Prints one JSON object: seconds of the call,
seconds per megapixel, and the process's peak resident memory before and after it.
"""

import argparse
import json
import resource

import torch
import torch.nn.functional as F

from benchmarks.timing import seconds
from stablesr_kit import StableSRPipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", required=True, help="print one JSON object")
    parser.add_argument("--model", default="mini")
    parser.add_argument("--size", type=int, nargs=2, default=[4096, 6144], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--w", type=float, default=0.5)
    parser.add_argument("--tile", type=int, default=None, help="side of a tile in pixels; the model's own if not given")
    parser.add_argument("--overlap", type=int, default=None, help="pixels; a quarter of a tile if not given")
    arguments = parser.parse_args()
    pipeline = StableSRPipeline.from_pretrained(arguments.model)
    height, width = arguments.size
    coarse = torch.rand(1, 3, max(height // 64, 2), max(width // 64, 2), generator=torch.Generator().manual_seed(0))
    picture = F.interpolate(coarse, (height // 4, width // 4), mode="bilinear")
    before = peak_rss_mb()
    call_s = seconds(
        lambda: pipeline(
            picture,
            w=arguments.w,
            tile_px=arguments.tile or "auto",
            overlap_px=arguments.overlap,
            generator=torch.Generator().manual_seed(0),
        )
    )
    megapixels = height * width / 1e6
    print(
        json.dumps(
            {
                "size": [height, width],
                "megapixels": round(megapixels, 2),
                "w": arguments.w,
                "threads": torch.get_num_threads(),
                "call_s": round(call_s, 1),
                "s_per_megapixel": round(call_s / megapixels, 2),
                "peak_rss_before_mb": before,
                "peak_rss_mb": peak_rss_mb(),
            }
        )
    )


def peak_rss_mb() -> int:
    """The most memory this process ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


if __name__ == "__main__":
    main()
