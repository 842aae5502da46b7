"""What the planner says of networks of the size of Stable Diffusion 2.1, without values and without a device.

python -m benchmarks.plan --json [--size 4096 6144] [--max-memory 8] [--dtype float16] [--steps 50]

Bytes are counted from the tensors that are alive at once; there are no seconds, since there is no device to measure.
Prints one JSON object.
"""

import argparse
import json
from dataclasses import asdict

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn

from benchmarks.full_size import SD21_UNET, SD21_VAE
from stablesr_kit.models.feature_wrapping import ControllableFeatureWrapping
from stablesr_kit.models.time_aware_encoder import StableSRAdapter
from stablesr_kit.tiling.memory import GIB, Plan, Planner, Tiling


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", required=True, help="print one JSON object")
    parser.add_argument("--size", type=int, nargs=2, default=(4096, 6144), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--max-memory", type=float, default=8.0, metavar="GIB")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float16")
    parser.add_argument("--steps", type=int, default=50)
    arguments = parser.parse_args()
    height, width = arguments.size
    plan = full_size_plan(
        height, width, int(arguments.max_memory * GIB), getattr(torch, arguments.dtype), arguments.steps
    )
    print(
        json.dumps(
            {
                "size_px": arguments.size,
                "max_memory_gib": arguments.max_memory,
                "dtype": arguments.dtype,
                "steps": arguments.steps,
                "grid": plan.grid and asdict(plan.grid),
                "vae_tile_px": plan.vae_tile_px,
                "peak_gib": round(plan.peak_bytes / GIB, 3),
                "tflops": round(plan.flops / 1e12),
                "attention_tflops": round(plan.attention_flops / 1e12),
            }
        )
    )


def full_size_plan(height: int, width: int, budget_bytes: int, dtype: torch.dtype, steps: int) -> Plan:
    """The plan with CFW for a result of height x width pixels."""
    with torch.device("meta"):
        vae = AutoencoderKL(**SD21_VAE)
        unet = UNet2DConditionModel(**SD21_UNET)
        networks = vae, unet, StableSRAdapter.from_unet(unet), ControllableFeatureWrapping.from_vae(vae)
    return Planner(*(nn.Module.to(network, dtype) for network in networks)).plan(
        height, width, Tiling(max_memory=budget_bytes), torch.device("cuda"), steps=steps, flops_per_second=1e12
    )


if __name__ == "__main__":
    main()
