"""Another w by decoding again, against the whole call: mini, at its default steps.

    python -m benchmarks.redecode --json [--sides 512 2048]

Prints one JSON object: for results of each side, in pixels, seconds of the processor of the whole call and of decoding
again with another w (the mean of two), and their ratio. A small picture is restored before, which no time counts.
"""

import argparse
import json
import time
from typing import Any

import numpy as np
import torch

from stablesr_kit import StableSRPipeline


def main() -> None:
    """Measure each side once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", required=True, help="print one JSON object")
    parser.add_argument("--sides", type=int, nargs="+", default=[512, 2048])
    arguments = parser.parse_args()
    pipeline = StableSRPipeline.from_pretrained("mini")
    pipeline.set_progress_bar_config(disable=True)
    report: dict[str, Any] = {"steps": pipeline.default_steps}
    pipeline(np.zeros((16, 16, 3), np.uint8), generator=torch.Generator().manual_seed(0))
    for side in arguments.sides:
        picture = np.random.default_rng(0).integers(0, 256, (side // 4, side // 4, 3), dtype=np.uint8)
        began = time.process_time()
        sampled = pipeline(picture, w=0.5, generator=torch.Generator().manual_seed(0), output_type="latent").sampled
        pipeline.redecode(sampled, 0.5)
        called = time.process_time()
        for w in (0.9, 0.1):
            pipeline.redecode(sampled, w)
        again_s = (time.process_time() - called) / 2
        report[str(side)] = {
            "call_s": round(called - began, 2),
            "again_s": round(again_s, 2),
            "ratio": round((called - began) / again_s, 2),
            "is_tiled": sampled.coder.tile_px is not None,
        }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
