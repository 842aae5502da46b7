"""Cost of StableSR beside stock Stable Diffusion 2.1: one denoising step, and the decoding.

python -m benchmarks.step --json [--dtype fp32 bf16] [--latent 64] [--repeats 5]

Random weights at full size. A ratio is the median over pairs that alternate within one run. Prints one JSON object:
dtype -> step | guided_step | decode -> {stablesr_s, stock_s, ratio}.
"""

import argparse
import gc
import json

import torch

from benchmarks.full_size import unet_and_adapter, vae_and_cfw
from benchmarks.timing import compare
from stablesr_kit.models.feature_wrapping import decode_with_features

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def measure_step(dtype: torch.dtype, latent: int, branches: int, repeats: int) -> dict[str, float]:
    """Adapter and steered UNet against the UNet alone; two branches are guidance, which share the adapter's maps."""
    unet, adapter = unet_and_adapter(dtype)
    lq_latent = torch.randn(1, 4, latent, latent, dtype=dtype)
    x = torch.randn(branches, 4, latent, latent, dtype=dtype)
    context = torch.randn(branches, 77, 1024, dtype=dtype)
    return compare(
        lambda: unet(x, 500, context, timestep_cond=adapter(lq_latent, 500)), lambda: unet(x, 500, context), repeats
    )


def measure_decode(dtype: torch.dtype, latent: int, repeats: int) -> dict[str, float]:
    """Decoding with CFW against the stock decoding; the features come with the encoding and are given."""
    vae, cfw = vae_and_cfw(dtype)
    z = torch.randn(1, 4, latent, latent, dtype=dtype)
    features = {
        level: torch.randn(1, channels, latent * 8 // 2**level, latent * 8 // 2**level, dtype=dtype)
        for level, channels in zip(cfw.config.levels, cfw.config.channels, strict=True)
    }
    return compare(lambda: decode_with_features(vae, cfw, z, features, 0.5), lambda: vae.decode(z), repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", required=True, help="print one JSON object")
    parser.add_argument("--dtype", nargs="+", choices=sorted(DTYPES), default=sorted(DTYPES))
    parser.add_argument("--latent", type=int, default=64, help="side of the latent; 64 is a 512 px picture")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    results = {}
    with torch.inference_mode():
        for name in arguments.dtype:
            dtype, latent, repeats = DTYPES[name], arguments.latent, arguments.repeats
            results[name] = {"step": measure_step(dtype, latent, 1, repeats)}
            gc.collect()
            results[name]["guided_step"] = measure_step(dtype, latent, 2, repeats)
            gc.collect()
            results[name]["decode"] = measure_decode(dtype, latent, repeats)
            gc.collect()
    print(json.dumps({"latent": arguments.latent, "threads": torch.get_num_threads(), **results}))


if __name__ == "__main__":
    main()
