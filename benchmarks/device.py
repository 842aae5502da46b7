"""What a GPU makes of StableSR at the size of Stable Diffusion 2.1: parity, times, tiles, memory, compilation.

python -m benchmarks.device --json [--device cuda] [--size full] [--budget-s 440] [--out FILE] [--only parity ...]

Random weights; the stock networks beside them have the same weights, without adapter and CFW, and run in turn with
them. Prints one JSON object in less than eight minutes. Each part is written to --out as soon as it is done; one for
which no time is left, or that fails, is named with its reason in "left_out".

    parity      dtype -> prediction | moments | decoded: largest difference from float32 on the CPU, relative to the
                largest value there; tf32 is float32 as torch does it by itself, fp32 without that
    times       dtype -> step | guided_step | encode | decode: seconds beside the stock networks, and the ratio
    tiles       tiles at once -> seconds per tile of a step
    calls       steps -> seconds of a whole call that ends in a picture of 512 px
    one_step    the same of OneStepPipeline
    weights_8   the UNet's weights in 8 bits: seconds and difference of a step, bytes; float8 is layerwise casting, int8
                torchao's, where it is installed
    memory      size of the result -> the allocator's peak without what earlier parts left there, the plan's, their
                ratio, and whether it is within 0.1 of 1
    compile     seconds of the first step, of a step, and the ratio to the step that is not compiled

--size tiny does the same with small networks in seconds on any device. The CPU's allocator keeps no peak.
"""

import argparse
import copy
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn

from benchmarks.full_size import FULL, TINY, Size, random_weights, unet_and_adapter, vae_and_cfw
from benchmarks.timing import compare, seconds
from stablesr_kit import ControllableFeatureWrapping, OneStepPipeline, SpacedDDPMScheduler, StableSRPipeline
from stablesr_kit.imaging.canvas import View, assembled
from stablesr_kit.models.default_prompt import DefaultPrompt
from stablesr_kit.models.execution import to_channels_last
from stablesr_kit.models.feature_wrapping import decode_with_features, encode_with_features
from stablesr_kit.models.steering import steered_prediction
from stablesr_kit.models.time_aware_encoder import StableSRAdapter
from stablesr_kit.spaces import unit_to_image
from stablesr_kit.storage import replacing_file
from stablesr_kit.tiling.autoencoder import PictureCoder
from stablesr_kit.tiling.memory import GIB, weight_bytes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TILES = (1, 2, 4, 8, 16)
WITHIN = 0.1
CPU = torch.device("cpu")

Networks = tuple[UNet2DConditionModel, StableSRAdapter, AutoencoderKL, ControllableFeatureWrapping]


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How large everything is.

    latent: side of the latents that are timed. results: (height, width) of the pictures whose memory is measured.
    steps: of the whole calls. compiler: backend of torch.compile.
    """

    networks: Size
    latent: int
    results: tuple[tuple[int, int], ...]
    steps: tuple[int, ...]
    repeats: int
    compiler: str


SCALES = {
    "full": Scale(
        networks=FULL,
        latent=64,
        results=((512, 512), (2048, 2048), (4096, 6144)),
        steps=(1, 2, 4, 50),
        repeats=5,
        compiler="inductor",
    ),
    "tiny": Scale(
        networks=TINY, latent=16, results=((128, 128), (384, 384)), steps=(1, 2), repeats=1, compiler="eager"
    ),
}


class Bench:
    """The parts of the measurement, in the order in which they matter; each returns what goes into the JSON."""

    def __init__(self, device: torch.device, scale: Scale) -> None:
        self.device = device
        self.scale = scale
        self.half = torch.float32 if device.type == "cpu" else torch.bfloat16

    @torch.no_grad()
    def parity(self) -> dict[str, Any]:
        networks = self._networks(torch.float32, CPU)
        expected = self._results(networks)
        found = {}
        for name, dtype in {"tf32": torch.float32, **DTYPES}.items():
            with _tf32(name == "tf32"):
                moved: Any = tuple(nn.Module.to(copy.deepcopy(one), self.device, dtype) for one in networks)
                results = self._results(moved)
            found[name] = {what: _difference(results[what], expected[what]) for what in expected}
        return found

    @torch.no_grad()
    def times(self) -> dict[str, Any]:
        return {name: self._times(dtype) for name, dtype in DTYPES.items()}

    @torch.no_grad()
    def tiles(self) -> dict[str, Any]:
        unet, adapter, _, _ = self._networks(self.half)
        found = {}
        for count in TILES:
            step = self._step(unet, adapter, count)
            step()
            found[str(count)] = min(seconds(step) for _ in range(self.scale.repeats)) / count
        return found

    def calls(self) -> dict[str, Any]:
        pipeline = self._pipeline()
        image = self._image(self.scale.latent * 2)
        call = partial(pipeline, image, w=0.5)
        call(num_inference_steps=1)  # warm-up
        return {str(steps): seconds(partial(call, num_inference_steps=steps)) for steps in self.scale.steps}

    def one_step(self) -> dict[str, Any]:
        stable = self._pipeline()
        pipeline = OneStepPipeline(stable.vae, stable.unet, stable.scheduler, default_prompt=self._default_prompt())
        pipeline.set_progress_bar_config(disable=True)
        image = self._image(self.scale.latent * 2)
        pipeline(image)
        return {"call_s": seconds(lambda: pipeline(image))}

    @torch.no_grad()
    def weights_8(self) -> dict[str, Any]:
        unet, adapter, _, _ = self._networks(self.half)
        step = self._step(unet, adapter, 1)
        before, plain_gib = step(), weight_bytes(unet) / GIB
        plain_s = min(seconds(step) for _ in range(self.scale.repeats))
        found: dict[str, Any] = {}
        for name, reduce in (("int8", _to_int8), ("float8", _to_float8)):
            reduced = reduce(copy.deepcopy(unet))
            if reduced is None:
                found[name] = {"left_out": "torchao is not installed"}
                continue
            step = self._step(reduced, adapter, 1)
            difference = _difference(step(), before)
            step_s = min(seconds(step) for _ in range(self.scale.repeats))
            found[name] = {"step_s": step_s, "ratio": step_s / plain_s, "difference": difference}
            found[name] |= {"gib": weight_bytes(reduced) / GIB, "before_gib": plain_gib}
        return found

    def memory(self) -> dict[str, Any]:
        """One step of each size, with CFW; the largest, which takes the longest, is the last."""
        found: dict[str, Any] = {}
        left = self._forget()
        pipeline = self._pipeline()
        for height, width in self.scale.results:
            self._forget()
            plan = pipeline.plan(height, width, w=0.5, num_inference_steps=1)
            self._forget()  # the plan measures how fast the device is
            took = seconds(partial(pipeline, self._image(height // 4, width // 4), w=0.5, num_inference_steps=1))
            measured = torch.cuda.max_memory_allocated(self.device) - left if self.device.type == "cuda" else None
            ratio = None if measured is None else measured / plan.peak_bytes
            found[f"{height}x{width}"] = {
                "plan": str(plan),
                "plan_gib": plan.peak_bytes / GIB,
                "peak_gib": None if measured is None else measured / GIB,
                "ratio": ratio,
                "is_within": None if ratio is None else abs(ratio - 1) <= WITHIN,
                "seconds": took,
            }
        return found

    @torch.no_grad()
    def compile(self) -> dict[str, Any]:
        pipeline = self._pipeline()
        plain = self._step(pipeline.unet, pipeline.adapter, 1)
        pipeline.compile_prediction(backend=self.scale.compiler)
        compiled = self._step(pipeline.unet, pipeline.adapter, 1, pipeline.predict)
        first_s = seconds(compiled)
        difference = _difference(compiled(), plain())
        compared = compare(compiled, plain, self.scale.repeats)
        torch.compiler.reset()  # recorded graphs keep their memory
        return {"first_step_s": first_s, "difference": difference, **compared}

    def _times(self, dtype: torch.dtype) -> dict[str, Any]:
        unet, adapter, vae, cfw = self._networks(dtype)
        side, repeats = self.scale.latent, self.scale.repeats
        x, z = self._noise(2, 4, side, side, dtype=dtype), self._noise(1, 4, side, side, dtype=dtype)
        image = self._noise(1, 3, 8 * side, 8 * side, dtype=dtype)
        prompt, at = self._prompt(2, dtype), torch.full((), 500, device=self.device)
        levels = tuple(cfw.config.levels)
        features = encode_with_features(vae, image, levels)[1]
        return {
            "step": compare(self._step(unet, adapter, 1), lambda: unet(x[:1], at, prompt[:1]), repeats),
            "guided_step": compare(
                lambda: steered_prediction(unet, adapter, z, at, z, prompt, 4.0), lambda: unet(x, at, prompt), repeats
            ),
            "encode": compare(lambda: encode_with_features(vae, image, levels), lambda: vae.encode(image), repeats),
            "decode": compare(lambda: decode_with_features(vae, cfw, z, features, 0.5), lambda: vae.decode(z), repeats),
        }

    def _results(self, networks: Networks) -> dict[str, Tensor]:
        """What each network makes of the same inputs, float32 on the CPU."""
        unet, adapter, vae, cfw = networks
        side = self.scale.latent
        generator = torch.Generator().manual_seed(0)
        x, lq = torch.randn(2, 1, 4, side, side, generator=generator).to(unet.device, unet.dtype)
        image = unit_to_image(torch.rand(3, 8 * side, 8 * side, generator=generator))
        prediction = steered_prediction(unet, adapter, x, 500, lq, self._prompt(1, unet.dtype).to(unet.device))
        coder = PictureCoder(vae, cfw)
        moments, features = coder.encode([View(image[None])], tuple(cfw.config.levels))
        decoded = assembled(coder.decode(x, features, 0.5)[0])
        return {"prediction": prediction.float().cpu(), "moments": moments.float().cpu(), "decoded": decoded.cpu()}

    def _step(
        self,
        unet: UNet2DConditionModel,
        adapter: StableSRAdapter,
        tiles: int,
        predict: Callable[..., Tensor] = steered_prediction,
    ) -> Callable[[], Tensor]:
        """A step without guidance for this many tiles."""
        side = self.scale.latent
        torch.manual_seed(1)  # the same inputs for all that are compared
        x, lq = self._noise(tiles, 4, side, side), self._noise(tiles, 4, side, side)
        x, lq, prompt = x.to(unet.dtype), lq.to(unet.dtype), self._prompt(tiles, unet.dtype)
        # where the pipeline has it: its own `predict` takes the number from the CPU, the networks on the device
        at = torch.full((), 500, device=self.device if predict is steered_prediction else CPU)
        return lambda: predict(unet, adapter, latents=x, timestep=at, lq_latents=lq, prompt_embeds=prompt)

    def _networks(self, dtype: torch.dtype, device: torch.device | None = None) -> Networks:
        """In the layout that from_pretrained gives them, the same weights every time on one device."""
        torch.manual_seed(0)
        at = dtype, device or self.device, self.scale.networks
        networks = (*unet_and_adapter(*at), *vae_and_cfw(*at))
        for network in networks:
            to_channels_last(network)
        return networks

    def _pipeline(self) -> Any:
        """A quiet `StableSRPipeline`."""
        unet, adapter, vae, cfw = self._networks(self.half)
        pipeline = StableSRPipeline(vae, unet, adapter, SpacedDDPMScheduler(), cfw)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def _default_prompt(self) -> DefaultPrompt:
        channels = self.scale.networks.unet["cross_attention_dim"]
        return random_weights(lambda: DefaultPrompt(channels=channels), self.half, self.device)

    def _prompt(self, count: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(count, 77, self.scale.networks.unet["cross_attention_dim"], dtype=dtype, device=self.device)

    def _image(self, height: int, width: int | None = None) -> Tensor:
        return torch.rand(3, height, width or height, generator=torch.Generator().manual_seed(0))

    def _noise(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=dtype)

    def _forget(self) -> int:
        """Let go of what earlier parts held, so that a peak is that of one call; bytes that are still allocated."""
        gc.collect()
        if self.device.type != "cuda":
            return 0
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.memory_allocated(self.device)


PARTS = ("parity", "times", "tiles", "calls", "one_step", "weights_8", "compile", "memory")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", required=True, help="print one JSON object")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", choices=sorted(SCALES), default="full")
    parser.add_argument("--budget-s", type=float, default=440.0, help="no part is begun after this many seconds")
    parser.add_argument("--out", type=Path, help="a file that holds what is known after each part")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    print(json.dumps(measured(device, SCALES[arguments.size], arguments.only, arguments.budget_s, arguments.out)))


def measured(
    device: torch.device, scale: Scale, parts: tuple[str, ...] = PARTS, budget_s: float = 440.0, out: Path | None = None
) -> dict[str, Any]:
    """What the parts found, by name."""
    began = time.perf_counter()
    bench = Bench(device, scale)
    found: dict[str, Any] = {"device": described(device), "torch": torch.__version__, "took_s": {}, "left_out": {}}
    for name in parts:
        started = time.perf_counter()
        if started - began > budget_s:
            found["left_out"][name] = f"{started - began:.0f} s of {budget_s:.0f} were used"
            continue
        try:
            found[name] = getattr(bench, name)()
        except Exception as error:  # the others are worth having all the same
            found["left_out"][name] = f"{type(error).__name__}: {error}".splitlines()[0]
        gc.collect()
        found["took_s"][name] = round(time.perf_counter() - started, 1)
        print(f"{name}: {found['took_s'][name]} s", file=sys.stderr)
        if out is not None:
            with replacing_file(out) as part:
                part.write_text(json.dumps(found, indent=1))
    return found


def _to_float8(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=unet.dtype)
    return unet


def _to_int8(unet: UNet2DConditionModel) -> UNet2DConditionModel | None:
    """Its linear layers with integer weights, as TorchAoConfig of diffusers makes them; None without torchao."""
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError:
        return None
    quantize_(unet, Int8WeightOnlyConfig())
    return unet


def described(device: torch.device) -> dict[str, Any]:
    """Name and memory of the device."""
    if device.type != "cuda":
        return {"name": device.type, "threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(device)
    return {"name": properties.name, "gib": properties.total_memory / GIB, "cuda": torch.version.cuda}


def _difference(one: Tensor, expected: Tensor) -> float:
    """The largest, relative to the largest value that is expected."""
    return ((one.float() - expected.float()).abs().max() / expected.float().abs().max()).item()


@contextmanager
def _tf32(is_allowed: bool) -> Iterator[None]:
    """Whether convolutions in float32 may round their inputs to 10 bits, which torch lets them by itself."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = is_allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


if __name__ == "__main__":
    main()
