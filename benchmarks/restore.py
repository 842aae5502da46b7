"""Time and memory of one restoration with the embedded model, as a user gets it.

python -m benchmarks.restore --json [--model mini] [--size 128] [--repeats 5] [--dtype float32]

A random picture of size x size, enlarged four times at w = 0.5 with the model's own number of steps. Prints one JSON
object: median seconds of a whole call (sampling and decoding), by clock and of the processor, seconds of loading, and
the process's peak resident memory.
"""

import argparse
import json
import resource
import statistics

import numpy as np
import torch

from benchmarks.timing import seconds, timed
from stablesr_kit import StableSRPipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", required=True, help="print one JSON object")
    parser.add_argument("--model", default="mini")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    arguments = parser.parse_args()
    loaded: list[StableSRPipeline] = []
    load_s = seconds(
        lambda: loaded.append(StableSRPipeline.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype)))
    )
    pipeline = loaded[0]
    pipeline.set_progress_bar_config(disable=True)
    picture = np.random.default_rng(0).integers(0, 256, (arguments.size, arguments.size, 3), dtype=np.uint8)
    pipeline(picture)  # warm-up
    calls = [timed(lambda: pipeline(picture)) for _ in range(arguments.repeats)]
    print(
        json.dumps(
            {
                "model": arguments.model,
                "size_px": arguments.size,
                "steps": pipeline.config.default_steps,
                "dtype": arguments.dtype,
                "threads": torch.get_num_threads(),
                "load_s": round(load_s, 2),
                "call_s": round(statistics.median(wall for wall, _ in calls), 2),
                "call_cpu_s": round(statistics.median(processor for _, processor in calls), 2),
                "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            }
        )
    )


if __name__ == "__main__":
    main()
