"""Cost of StableSR beside stock Stable Diffusion 2.1: one denoising step, the encoding, and the decoding.

OMP_NUM_THREADS=1 python -m benchmarks.step --json [--dtype fp32 bf16] [--latent 64] [--repeats 5] [--only step ...]

Random weights at full size: StableSR in the layout that from_pretrained gives it, the stock networks in that of
diffusers. A ratio is the median over pairs that alternate within one run. Prints one JSON object: dtype -> step |
guided_step | encode | decode -> {stablesr_s, stock_s, ratio, stablesr_cpu_s, stock_cpu_s, cpu_ratio}, where cpu is
processor time; with two dtypes also bf16_by_fp32 -> the same names -> the ratio of StableSR's processor times. With
--compile, step and guided_step are those of `compile_prediction`.
"""

import argparse
import copy
import gc
import json
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.full_size import unet_and_adapter, vae_and_cfw
from benchmarks.timing import compare
from stablesr_kit.models.execution import to_channels_last
from stablesr_kit.models.feature_wrapping import decode_with_features, encode_with_features
from stablesr_kit.models.steering import steered_prediction
from stablesr_kit.spaces import unit_to_image

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WHAT = ("step", "guided_step", "encode", "decode")
Comparison = dict[str, dict[str, float]]


def measure_steps(
    dtype: torch.dtype, latent: int, repeats: int, is_compiled: bool, only: Sequence[str] = WHAT
) -> Comparison:
    """Adapter and steered UNet against the UNet alone; two branches are guidance, which share the adapter's maps."""
    unet, adapter = unet_and_adapter(dtype)
    stock = copy.deepcopy(unet)
    to_channels_last(unet)
    to_channels_last(adapter)
    predict = torch.compile(steered_prediction, dynamic=False) if is_compiled else steered_prediction
    lq, x = torch.randn(2, 1, 4, latent, latent, dtype=dtype)
    at, prompt = torch.tensor(500), torch.randn(2, 77, 1024, dtype=dtype)
    pairs = {
        "step": (lambda: predict(unet, adapter, x, at, lq, prompt[:1]), lambda: stock(x, at, prompt[:1])),
        "guided_step": (
            lambda: predict(unet, adapter, x, at, lq, prompt, 4.0),
            lambda: stock(x.expand(2, -1, -1, -1), at, prompt),
        ),
    }
    return {name: compare(*pair, repeats) for name, pair in pairs.items() if name in only}


def measure_coding(dtype: torch.dtype, latent: int, repeats: int, only: Sequence[str] = WHAT) -> Comparison:
    """Encoding with CFW's features and decoding with CFW against the stock coding; the decoder is given features."""
    vae, cfw = vae_and_cfw(dtype)
    stock = copy.deepcopy(vae)
    to_channels_last(vae)
    to_channels_last(cfw)
    image = unit_to_image(torch.rand(1, 3, 8 * latent, 8 * latent, dtype=dtype))
    z = torch.randn(1, 4, latent, latent, dtype=dtype)
    levels = tuple(cfw.config.levels)
    features = encode_with_features(vae, image, levels)[1]
    pairs = {
        "encode": (lambda: encode_with_features(vae, image, levels), lambda: stock.encode(image)),
        "decode": (lambda: decode_with_features(vae, cfw, z, features, 0.5), lambda: stock.decode(z)),
    }
    return {name: compare(*pair, repeats) for name, pair in pairs.items() if name in only}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", required=True, help="print one JSON object")
    parser.add_argument("--dtype", nargs="+", choices=sorted(DTYPES), default=sorted(DTYPES))
    parser.add_argument("--latent", type=int, default=64, help="side of the latent; 64 is a 512 px picture")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="compile the steps of StableSR")
    parser.add_argument("--only", nargs="+", choices=WHAT, default=WHAT)
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    with torch.no_grad():
        for name in arguments.dtype:
            dtype = DTYPES[name]
            results[name] = {}
            if {"step", "guided_step"} & set(arguments.only):
                results[name] |= measure_steps(
                    dtype, arguments.latent, arguments.repeats, arguments.compile, arguments.only
                )
            gc.collect()
            if {"encode", "decode"} & set(arguments.only):
                results[name] |= measure_coding(dtype, arguments.latent, arguments.repeats, arguments.only)
            gc.collect()
    if len(results) == 2:
        results["bf16_by_fp32"] = {
            name: found["stablesr_cpu_s"] / results["fp32"][name]["stablesr_cpu_s"]
            for name, found in results["bf16"].items()
        }
    print(json.dumps({"latent": arguments.latent, "threads": torch.get_num_threads(), **results}))


if __name__ == "__main__":
    main()
