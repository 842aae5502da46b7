"""Samples per second and peak memory of the training programs, with and without gradient checkpointing.

python -m benchmarks.training --json [--size mini | sd21] [--stages autoencoder prior ...] [--steps 3]

mini: every stage with its config of configs/mini or configs/mini_faces, discriminators from the first step on. sd21:
stablesr and cfw with the official configs on networks of the size of Stable Diffusion 2.1, one sample a batch. Weights
and photographs are random. Each measurement is a process of its own that runs the program; its seconds are from the
first step to the last, or, for a single step, from the first call of a network; its peak is that of the GPU's
allocator, or of the resident memory without one. Prints one JSON object; results as they come are on stderr.
"""

import argparse
import json
import platform
import resource
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from diffusers import DDPMScheduler
from PIL import Image
from safetensors.torch import save_file
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

from benchmarks.full_size import random_weights, unet_and_adapter, vae_and_cfw
from stablesr_kit.models.codeformer import CodeFormer
from stablesr_kit.models.vqgan import VQGAN
from stablesr_kit.pipelines.loading import resolve_model
from stablesr_kit.training.run.run import TrainingRun

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A stage: its program, its config, and what differs from that; in flags, {folder} is that of the inputs."""

    program: str
    config: str
    flags: Mapping[str, str]


PHOTOS = {"train_data_dir": "[{folder}/photos]", "photo_scales": "[1]", "favourite_photos": "[]"}
FACES = {"train_data_dir": "[{folder}/photos]", "excluded_photos": "[]", "pretrained_vqgan": "{folder}/vqgan"}
LATENTS = {"latents": "{folder}/latents.safetensors"}
FUSION = {"samples": "{folder}/samples.safetensors", "discriminator_start": "0"}
MINI = str(resolve_model("mini"))

SIZES: dict[str, dict[str, Measured]] = {
    "mini": {
        "autoencoder": Measured(program="train_autoencoder", config="mini/autoencoder", flags=PHOTOS),
        "decoder": Measured(
            program="train_decoder", config="mini/decoder", flags={**PHOTOS, "pretrained_vae": f"{MINI}/vae"}
        ),
        "prior": Measured(program="train_prior", config="mini/prior", flags=LATENTS),
        "stablesr": Measured(
            program="train_stablesr",
            config="mini/stablesr",
            flags={**LATENTS, "pretrained_unet": f"{MINI}/unet", "pretrained_adapter": f"{MINI}/adapter"},
        ),
        "cfw": Measured(program="train_cfw", config="mini/cfw", flags={**FUSION, "pretrained_vae": f"{MINI}/vae"}),
        "vqgan": Measured(
            program="train_vqgan", config="mini_faces/vqgan", flags={**FACES, "discriminator_start": "0"}
        ),
        "codeformer_stage2": Measured(program="train_codeformer", config="mini_faces/codeformer_stage2", flags=FACES),
        "codeformer_stage3": Measured(
            program="train_codeformer",
            config="mini_faces/codeformer_stage3",
            flags={
                **FACES,
                "pretrained_codeformer": "{folder}/codeformer",
                "pretrained_discriminator": "null",
                "discriminator_start": "0",
            },
        ),
    },
    "sd21": {
        "stablesr": Measured(
            program="train_stablesr",
            config="official/stablesr_512",
            flags={
                "train_data_dir": "[{folder}/photos]",
                "pretrained_model": "{folder}/sd21",
                "train_batch_size": "1",
                "gradient_accumulation_steps": "1",
                "min_photo_bytes": "0",
                "pair_queue_size": "0",
            },
        ),
        "cfw": Measured(
            program="train_cfw",
            config="official/cfw",
            flags={
                **FUSION,
                "pretrained_vae": "{folder}/sd21/vae",
                "perceptual_weights": "{folder}/vgg16.safetensors",
                "gradient_accumulation_steps": "1",
            },
        ),
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", required=True, help="print one JSON object")
    parser.add_argument("--size", choices=sorted(SIZES), default="mini")
    parser.add_argument("--stages", nargs="+", metavar="STAGE", help="of this size; all if not given")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps of each measurement")
    parser.add_argument("--measure", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(*arguments.measure)))
        return
    known = SIZES[arguments.size]
    stages = arguments.stages or list(known)
    if unknown := set(stages) - set(known):
        parser.error(f"{', '.join(sorted(unknown))} is no stage of {arguments.size}; use {', '.join(known)}")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder), arguments.size)
        for stage in stages:
            for use_checkpointing in (False, True):
                call = call_of(known[stage], Path(folder), arguments.steps, use_checkpointing)
                command = [sys.executable, "-m", "benchmarks.training", "--json", "--measure", *call]
                finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                result = {"stage": stage, "gradient_checkpointing": use_checkpointing, **json.loads(finished.stdout)}
                print(json.dumps(result), file=sys.stderr, flush=True)  # each as it comes, since all take a while
                results.append(result)
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    print(
        json.dumps({"size": arguments.size, "device": machine, "threads": torch.get_num_threads(), "results": results})
    )


def call_of(stage: Measured, folder: Path, steps: int, use_checkpointing: bool) -> list[str]:
    """Program and flags of one measurement."""
    flags = {
        **stage.flags,
        "max_train_steps": str(steps),
        "checkpointing_steps": str(steps),
        "lr_warmup_steps": "1",
        "resume_from_checkpoint": "null",
        "gradient_checkpointing": str(use_checkpointing).lower(),
        "output_dir": "{folder}/run",
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", value.replace("{folder}", str(folder)))]
    return [stage.program, "--config", str(ROOT / "configs" / f"{stage.config}.yaml"), *words]


class Trained(Exception):
    """The steps to measure are done; what the program would save then is of no interest."""


def measure(program: str, *flags: str) -> dict[str, Any]:
    """Run a program until its last step."""
    config = dict(zip(flags[::2], flags[1::2], strict=True))
    steps, begin, ends = int(config["--max_train_steps"]), list[float](), dict[int, list[float]]()

    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def before_call(*_arguments: Any) -> None:
        if not begin:
            begin.append(now())

    def after_step(optimizer: Any, *_arguments: Any) -> None:
        ends.setdefault(id(optimizer), []).append(now())

    register_module_forward_pre_hook(before_call)
    register_optimizer_step_post_hook(after_step)
    options: dict[str, Any] = {}

    def stop(run: Any) -> None:
        options.update(vars(run.config), samples=run.samples_per_step)
        raise Trained

    TrainingRun.save = stop  # type: ignore[method-assign, assignment]
    sys.argv = [program, *flags]
    try:
        with redirect_stdout(sys.stderr):
            runpy.run_path(str(ROOT / "training" / f"{program}.py"), run_name="__main__")
    except Trained:
        pass
    moments = max(ends.values(), key=lambda times: times[-1])
    seconds = (moments[-1] - moments[0]) / (steps - 1) if steps > 1 else moments[0] - begin[0]
    if torch.cuda.is_available():
        memory = {"peak_memory_mb": torch.cuda.max_memory_allocated() // 2**20, "memory_of": "cuda"}
    else:
        memory = {"peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**10, "memory_of": "process"}
    return {
        "samples_per_step": options["samples"],
        "mixed_precision": options["mixed_precision"],
        "s_per_step": round(seconds, 3),
        "samples_per_s": round(options["samples"] / seconds, 3),
        **memory,
    }


def write_inputs(folder: Path, size: str) -> None:
    """What the stages need of earlier ones, with random values: of the right sizes, so that it costs the same."""
    side = 512 if size == "sd21" else 256
    draws, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    (folder / "photos").mkdir()
    for i in range(8):
        coarse = Image.fromarray(draws.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8))
        coarse.resize((side, side), Image.Resampling.BICUBIC).save(folder / "photos" / f"{i}.png")
    factor = 8 if size == "sd21" else 4
    latents = torch.randn(4, 4, side // factor, side // factor, generator=generator).half()
    pixels = torch.randint(0, 256, (4, side, side, 3), generator=generator, dtype=torch.uint8)
    save_file({"hq": pixels, "lq": pixels.clone(), "latents": latents}, folder / "samples.safetensors")
    save_file({"hq": latents, "lq": latents[:, None].clone()}, folder / "latents.safetensors")
    writers: dict[str, Callable[[Path], None]] = {"mini": write_faces_networks, "sd21": write_full_size_networks}
    writers[size](folder)


def write_faces_networks(folder: Path) -> None:
    """VQGAN and CodeFormer of the sizes of configs/mini_faces."""
    vqgan = VQGAN(
        image_size=256,
        base_channels=24,
        channel_multipliers=(1, 2, 4, 6, 8),
        layers_per_block=1,
        attention_resolutions=(),
        norm_num_groups=1,
        codebook_size=1024,
        code_channels=64,
    )
    vqgan.save_pretrained(folder / "vqgan")
    CodeFormer.from_vqgan(vqgan, 192, 6, 6, (32, 64, 128)).save_pretrained(folder / "codeformer")


def write_full_size_networks(folder: Path) -> None:
    """UNet, autoencoder and schedule of Stable Diffusion 2.1 as its folder, and a VGG-16."""
    unet_and_adapter(torch.float32)[0].save_pretrained(folder / "sd21" / "unet")
    vae_and_cfw(torch.float32)[0].save_pretrained(folder / "sd21" / "vae")
    DDPMScheduler(prediction_type="epsilon").save_pretrained(folder / "sd21" / "scheduler")
    vgg = random_weights(lambda: torchvision.models.vgg16().features, torch.float32)
    save_file({f"features.{name}": tensor for name, tensor in vgg.state_dict().items()}, folder / "vgg16.safetensors")


if __name__ == "__main__":
    main()
