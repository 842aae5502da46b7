"""StableSR against reference outputs of the official modules: the layout of `goldens/stablesr`, any config and seed.

Each check takes the folder and the networks built from its official weights, and yields (quantity, max |difference|,
tolerance). A reference tensor that no check compares is reported with an infinite difference.
"""

import logging
import re
from collections.abc import Callable, Iterator
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn

from stablesr_kit.checkpoints import load_official
from stablesr_kit.diffusion.spaced import SpacedDDIMScheduler, SpacedDDPMScheduler, ddim_sigma
from stablesr_kit.imaging.canvas import View, assembled
from stablesr_kit.models.feature_wrapping import decode_with_features, encode_with_features
from stablesr_kit.models.steering import steered_prediction
from stablesr_kit.pipelines.stablesr import StableSRPipeline
from stablesr_kit.spaces import to_latent
from stablesr_kit.tiling.latents import Aggregation, TileGrid, gaussian_weights, tile_offsets
from stablesr_kit.training.losses.denoising import denoising_loss, hide_in_noise
from tests.parity.references import (
    MissingInput,
    Ours,
    Quantity,
    Reference,
    checked,
    compare,
    difference,
    metadata,
    read_json,
    read_tensors,
)
from tests.parity.stablesr_colorfix import check_colorfix
from tests.parity.stablesr_degradation import check_degradation
from tests.parity.stablesr_tiles import check_tiles

logger = logging.getLogger(__name__)

MODULE = 2e-5
LOSS = 1e-5


class Official:
    """A folder of references, and the pipeline built from its weights."""

    def __init__(self, folder: Path, pipeline: StableSRPipeline | None = None) -> None:
        self.folder = folder
        self._pipeline = pipeline

    def file(self, name: str) -> Reference[Tensor]:
        """The tensors of a reference file; half precision is how weights and pictures are stored."""
        stored = read_tensors(self.folder / f"{name}.safetensors")
        return Reference({key: t.float() if t.dtype == torch.float16 else t for key, t in stored.items()})

    @cached_property
    def config(self) -> Reference[Any]:
        """Arguments of the official modules."""
        return read_json(self.folder / "config.json")

    @cached_property
    def pipeline(self) -> StableSRPipeline:
        """Weights that only `shapes.json` lists are zero: a compact folder holds no more than its quantities take."""
        if self._pipeline is not None:
            return self._pipeline
        listed = read_json(self.folder / SHAPES) if (self.folder / SHAPES).exists() else {}
        weights = {}
        for part, name in {"unet": "unet", "encoder": "structcond", "cfw": "cfw"}.items():
            absent = {key: torch.zeros(shape) for key, shape in listed.get(name, {}).items()}
            weights[part] = absent | read_tensors(self.folder / f"weights_{name}.safetensors")
        return StableSRPipeline(**load_official(self.config, **weights))

    @property
    def scheduler(self) -> SpacedDDPMScheduler:
        """A new one, for what the UNet predicts."""
        prediction = "v_prediction" if self.config["parameterization"] == "v" else "epsilon"
        return SpacedDDPMScheduler(prediction_type=prediction)

    def compare_samples(self, name: str, reference: Reference[Tensor], ours: Ours) -> Iterator[Quantity]:
        """One quantity per sampled output; rounding grows with the result, and more so where the UNet predicts eps."""
        expected = {key: tensor for key, tensor in reference.items() if key.startswith("out")}
        relative = {"eps": 2e-5, "v": 1e-5}

        def tolerance(_name: str, output: Tensor) -> float:
            return relative[self.config["parameterization"]] * output.abs().max().item()

        yield from compare(name, expected, ours, tolerance)


def outputs(reference: Reference[Tensor]) -> dict[str, Tensor]:
    """What is compared of a file that names its inputs in_*."""
    return {key: tensor for key, tensor in reference.items() if not key.startswith("in_")}


def check_structcond(official: Official, name: str) -> Iterator[Quantity]:
    """Features of the time-aware encoder, which the reference names by their width."""
    reference = official.file(name)

    @cache
    def features() -> dict[str, Tensor]:
        encoded = official.pipeline.adapter.encode(reference["in_latent"], reference["in_timesteps"])
        return {f"out_{feature.shape[-1]}": feature for feature in encoded}

    ours: Ours = {key: partial(lambda key: features()[key], key) for key in outputs(reference) if _is_feature(key)}
    yield from compare(name, outputs(reference), ours, MODULE)


def _is_feature(key: str) -> bool:
    return re.fullmatch(r"out_\d+", key) is not None


def check_unet(official: Official, name: str) -> Iterator[Quantity]:
    """The UNet under given features, and a few of its activations."""
    reference = official.file(name)

    @cache
    def activations() -> dict[str, Tensor]:
        pipeline = official.pipeline
        given = sorted((key for key in reference if key.startswith("in_struct_")), key=lambda key: int(key[10:]))
        if len(given) != len(pipeline.adapter.config.block_out_channels):
            raise MissingInput("one of in_struct_*")
        sft = pipeline.adapter.modulate([reference[key] for key in reversed(given)])
        seen: dict[str, Tensor] = {}
        first = pipeline.unet.down_blocks[0].resnets[0]
        watched = {
            "dbg_input0": pipeline.unet.conv_in,
            "dbg_input1_res_prespade": first.conv2,
            "resnet": first,
            "dbg_input1": pipeline.unet.down_blocks[0].attentions[0],
            "dbg_middle": pipeline.unet.mid_block,
        }
        inputs = [reference[f"in_{part}"] for part in ("x", "timesteps", "context")]
        hooks = [module.register_forward_hook(remember(seen, key)) for key, module in watched.items()]
        seen["out"] = pipeline.unet(*inputs, timestep_cond=sft).sample
        for hook in hooks:
            hook.remove()
        skip = seen["dbg_input0"] if first.conv_shortcut is None else first.conv_shortcut(seen["dbg_input0"])
        seen["dbg_input1_res_postspade"] = seen["resnet"] - skip
        return seen

    known = ("out", "dbg_input0", "dbg_input1_res_prespade", "dbg_input1_res_postspade", "dbg_input1", "dbg_middle")
    ours: Ours = {key: partial(lambda key: activations()[key], key) for key in known}
    yield from compare(name, outputs(reference), ours, MODULE)


def remember(seen: dict[str, Tensor], key: str) -> Callable[[nn.Module, Any, Any], None]:
    """A forward hook that keeps a module's output."""

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        seen[key] = output if isinstance(output, Tensor) else output[0]

    return hook


def check_cfw(official: Official, name: str) -> Iterator[Quantity]:
    """Posterior, encoder features, decoding at several w, and one fusion layer alone."""
    reference = official.file(name)

    @cache
    def encoded() -> tuple[DiagonalGaussianDistribution, dict[int, Tensor]]:
        levels = tuple(official.pipeline.cfw.config.levels)
        return encode_with_features(official.pipeline.vae, reference["in_image"], levels)

    def drawn() -> Tensor:
        posterior = encoded()[0]
        return to_latent(posterior.mean + posterior.std * reference["in_eps"], official.pipeline.vae)

    def feature(number: int) -> Tensor:
        return encoded()[1][sorted(encoded()[1])[number]]

    def decoded(w: float) -> Tensor:
        pipeline = official.pipeline
        return decode_with_features(pipeline.vae, pipeline.cfw, reference["in_z"], encoded()[1], w)

    def fused(w: float) -> Tensor:
        last = max(encoded()[1])
        return official.pipeline.cfw(last, encoded()[1][last], reference["in_fuse2_dec_feat"], w)

    ours: Ours = {
        "out_moments": lambda: encoded()[0].parameters,
        "out_mean": lambda: encoded()[0].mean,
        "out_std": lambda: encoded()[0].std,
        "out_init_latent": drawn,
        "out_decoded_plain_kl": lambda: official.pipeline.vae.decode(reference["in_z"]).sample,
    }
    for key in reference:
        if named := re.fullmatch(r"out_(enc_fea_|decoded_w|fuse2_w)([\d.]+)", key):
            if named[1] == "enc_fea_":
                ours[key] = partial(feature, int(named[2]))
            else:
                ours[key] = partial(decoded if named[1] == "decoded_w" else fused, float(named[2]))
    yield from compare(name, outputs(reference), ours, MODULE)


def check_schedule(official: Official, name: str) -> Iterator[Quantity]:
    """Buffers of the full and the respaced diffusions, of the released DDIM, and noising."""
    reference = official.file(name)
    ours: Ours = {}
    for key in reference:
        if column := re.fullmatch(r"(full|s\d+)_(\w+)", key):
            steps = None if column[1] == "full" else int(column[1][1:])
            ours[key] = partial(posterior_column, official, steps, column[2])
        elif column := re.fullmatch(r"ddim(\d+)_eta([\d.]+)_(\w+)", key):
            ours[key] = partial(official_ddim_column, official, int(column[1]), float(column[2]), column[3])
        elif moment := re.fullmatch(r"qsample_t(\d+)", key):
            ours[key] = partial(noised, official, reference, int(moment[1]))
    inputs = {"qsample_in_latent", "qsample_in_noise"}

    def tolerance(_name: str, expected: Tensor) -> float:
        return 2e-5 * max(expected.abs().max().item(), 1.0) if expected.is_floating_point() else 0.0

    yield from compare(name, {key: reference[key] for key in reference if key not in inputs}, ours, tolerance)


def noised(official: Official, reference: Reference[Tensor], timestep: int) -> Tensor:
    """The reference's latent with its noise."""
    noise = reference["qsample_in_noise"]
    t = torch.full((len(noise),), timestep)
    return official.scheduler.add_noise(reference["qsample_in_latent"], noise, t)


def posterior_column(official: Official, steps: int | None, column: str) -> Tensor:
    """One of the scheduler's coefficients by its official name; steps: None for the full diffusion."""
    scheduler = official.scheduler
    if steps is not None:
        scheduler.set_timesteps(steps)
    posterior = scheduler.posterior
    a = posterior.alphas_cumprod
    columns = {
        "timesteps": scheduler.timesteps.flip(0),
        "betas": posterior.betas,
        "alphas_cumprod": a,
        "alphas_cumprod_prev": posterior.alphas_cumprod_prev,
        "posterior_variance": posterior.variance,
        "posterior_log_variance_clipped": posterior.log_variance,
        "posterior_mean_coef1": posterior.coef1,
        "posterior_mean_coef2": posterior.coef2,
        "sqrt_alphas_cumprod": a.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - a).sqrt(),
        "sqrt_recip_alphas_cumprod": (1 / a).sqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / a - 1).sqrt(),
    }
    return columns.get(column, torch.tensor(torch.nan))


def official_ddim_column(official: Official, steps: int, eta: float, column: str) -> Tensor:
    """One of the released DDIM's timesteps, alphas and sigmas by its official name."""
    scheduler = SpacedDDIMScheduler.from_config(official.scheduler.config, official_quirks=True)
    scheduler.set_timesteps(steps)
    alphas, alphas_prev = scheduler.ddim_alphas()
    columns = {
        "spaced_timesteps_fed_to_net": scheduler.timesteps.flip(0),
        "uniform_timesteps": torch.arange(0, 1000, 1000 // steps),
        "alphas": alphas,
        "alphas_prev": alphas_prev.double(),
        "sigmas": ddim_sigma(alphas.double(), alphas_prev.double(), eta),
        "sqrt_one_minus_alphas": (1 - alphas).sqrt(),
    }
    return columns.get(column, torch.tensor(torch.nan))


class Trajectory(NamedTuple):
    """A sampling run: x and x0 after each step, (steps, B, C, h, w)."""

    x: Tensor
    x0: Tensor


def sample(
    official: Official,
    reference: Reference[Tensor],
    scheduler: SpacedDDPMScheduler,
    guidance_scale: float = 1.0,
    grid: TileGrid | None = None,
    **step_arguments: Any,
) -> Trajectory:
    """The pipeline's prediction and the scheduler's step in a loop, with the reference's noise."""
    x, context = reference["in_x_T"], reference["in_context"]
    if guidance_scale != 1.0:
        context = torch.cat([reference["in_neg_context"].expand_as(context), context])
    aggregation = Aggregation(
        (x.shape[-2], x.shape[-1]),
        grid,
        1,
        x.device,
        x.dtype,
        weights=partial(gaussian_weights, official_quirks=True),
    )
    visited, denoised = [], []
    for step, (timestep, noise) in enumerate(zip(scheduler.timesteps, reference["in_step_noises"], strict=True)):
        networks = official.pipeline.unet, official.pipeline.adapter
        predict = partial(steered_prediction, *networks, timestep=timestep, guidance_scale=guidance_scale)
        prediction = aggregation.predict(predict, x, reference["in_struct_latent"], context, step)
        x, x0 = scheduler.step(prediction, timestep, x, variance_noise=noise, return_dict=False, **step_arguments)
        visited.append(x)
        denoised.append(x0)
    return Trajectory(torch.stack(visited), torch.stack(denoised))


def spaced(official: Official, reference: Reference[Tensor]) -> SpacedDDPMScheduler:
    """The DDPM scheduler with as many steps as the reference has noises."""
    scheduler = official.scheduler
    scheduler.set_timesteps(len(reference["in_step_noises"]))
    return scheduler


def check_sample_ddpm(official: Official, name: str) -> Iterator[Quantity]:
    """Respaced DDPM from the noised LQ latent, and the decoding of its result with CFW."""
    reference = official.file(name)
    run = cache(lambda: sample(official, reference, spaced(official, reference)))
    features = cache(lambda: official.pipeline.encode([View(one) for one in reference["in_lq_image"].split(1)])[1])

    def decoded(w: float) -> Tensor:
        return assembled(official.pipeline.decode(reference["out"][:1], features(), w)[0])

    def denoised(step: int) -> Tensor:
        return run().x0[step]

    def timesteps() -> float:
        visited = spaced(official, reference).timesteps
        return difference(visited, reference["in_timesteps"].sort(descending=True)[0])

    ours: Ours = {"out_traj": lambda: run().x, "out": lambda: run().x[-1]}
    for key in reference:
        if at_step := re.fullmatch(r"out_x0_step(\d+)", key):
            ours[key] = partial(denoised, int(at_step[1]))
        elif with_w := re.fullmatch(r"out_decoded_w([\d.]+)", key):
            ours[key] = partial(decoded, float(with_w[1]))
    if "in_timesteps" in reference:
        yield from checked(f"{name}.in_timesteps", timesteps, 0.0)
    yield from official.compare_samples(name, reference, ours)


def check_sample_ddpm_guidance(official: Official, name: str) -> Iterator[Quantity]:
    """Respaced DDPM with classifier-free guidance, and with a reference latent."""
    reference = official.file(name)
    about = metadata(official.folder / f"{name}.safetensors")

    def guided() -> Tensor:
        return sample(official, reference, spaced(official, reference), about["scale"]).x[-1]

    def referenced() -> Tensor:
        settings, latent = about["reference"], reference["in_reference_latent"]
        first, last = settings["range"]

        def towards_reference(denoised: Tensor, index: int) -> Tensor:
            is_within = first <= index <= last
            return towards(denoised, latent, settings["lr"], settings["step"]) if is_within else denoised

        return sample(official, reference, spaced(official, reference), denoised_fn=towards_reference).x[-1]

    yield from official.compare_samples(name, reference, {"out": guided, "out_reference": referenced})


def towards(denoised: Tensor, reference: Tensor, lr: float, num_steps: int) -> Tensor:
    """Denoised latent (B, C, h, w) after gradient steps on its squared distance to a reference latent.

    The mean is over the batch, the sum over the rest, as in StableSR's face script.
    """
    for _ in range(num_steps):
        denoised = denoised - lr * 2 * (denoised - reference) / denoised.shape[0]
    return denoised


def check_sample_ddim(official: Official, name: str) -> Iterator[Quantity]:
    """The released DDIM with and without guidance, and with guidance on a canvas."""
    reference = official.file(name)
    about = metadata(official.folder / f"{name}.safetensors")
    on_canvas = Reference({key[len("canvas_") :]: t for key, t in reference.items() if key.startswith("canvas_")})

    @cache
    def scheduler() -> SpacedDDIMScheduler:
        made = SpacedDDIMScheduler.from_config(official.scheduler.config, official_quirks=True)
        made.set_timesteps(len(reference["in_step_noises"]))
        return made

    def guided() -> Tensor:
        return sample(official, reference, scheduler(), about["scale"], eta=about["eta"]).x[-1]

    def unguided() -> Tensor:
        return sample(official, reference, scheduler(), eta=about["eta"]).x[-1]

    def canvas() -> Tensor:
        grid = official_grid(about)
        return sample(official, on_canvas, scheduler(), about["scale"], grid, eta=about["eta"]).x[-1]

    def timesteps_fed() -> float:
        return difference(scheduler().timesteps.sort()[0], reference["in_timesteps_fed"].sort()[0])

    if "in_timesteps_fed" in reference:
        yield from checked(f"{name}.in_timesteps_fed", timesteps_fed, 0.0)
    ours: Ours = {"out": guided, "out_noguidance": unguided, "out_canvas": canvas}
    yield from official.compare_samples(name, reference, ours)


def check_train_loss(official: Official, name: str) -> Iterator[Quantity]:
    """One training loss; in a compact folder of the stored prediction, since the UNet's weights are not all there."""
    reference = official.file(name)
    scheduler = official.scheduler

    @cache
    def noised_and_target() -> tuple[Tensor, Tensor]:
        return hide_in_noise(reference["in_z_gt"], reference["in_noise"], reference["in_t"], scheduler)

    @cache
    def prediction() -> Tensor:
        if "in_pred" in reference:
            return reference["in_pred"]
        timestep, context = reference["in_t"], reference["in_context"]
        sft = official.pipeline.adapter(reference["in_z_lq"], timestep)
        return official.pipeline.unet(noised_and_target()[0], timestep, context, timestep_cond=sft, return_dict=False)[
            0
        ]

    ours: Ours = {
        "out_x_noisy": lambda: noised_and_target()[0],
        "out_target": lambda: noised_and_target()[1],
        "out_pred": prediction,
        "out_loss": lambda: denoising_loss(prediction(), noised_and_target()[1], reference["in_t"], scheduler),
    }
    yield from compare(name, outputs(reference), ours, lambda key, _: LOSS if key == "out_loss" else MODULE)


def check_sample_canvas(official: Official, name: str) -> Iterator[Quantity]:
    """Aggregation sampling: respaced DDPM on a canvas larger than a tile."""
    reference = official.file(name)
    about = metadata(official.folder / f"{name}.safetensors")
    run = cache(lambda: sample(official, reference, spaced(official, reference), grid=official_grid(about)))

    def offsets(axis: int) -> Tensor:
        grid = official_grid(about)
        return torch.tensor(tile_offsets(reference["in_x_T"].shape[axis], grid.tile[0], grid.overlap))

    places = {key: reference[key] for key in ("tile_y_offsets", "tile_x_offsets") if key in reference}
    own: Ours = {"tile_y_offsets": partial(offsets, -2), "tile_x_offsets": partial(offsets, -1)}
    yield from compare(name, places, own, 0.0)
    ours: Ours = {
        "out": lambda: run().x[-1],
        "out_step0": lambda: run().x[0],
        "out_step0_x0": lambda: run().x0[0],
    }
    yield from official.compare_samples(name, reference, ours)


def official_grid(about: Reference[Any]) -> TileGrid:
    """The tiles a reference was made with."""
    return TileGrid(tile=(about["tile"], about["tile"]), overlap=about["overlap"])


CHECKS: dict[str, Callable[[Official, str], Iterator[Quantity]]] = {
    "structcond_sq": check_structcond,
    "structcond_nonsq": check_structcond,
    "unet_sq": check_unet,
    "unet_nonsq": check_unet,
    "cfw_a": check_cfw,
    "cfw_b": check_cfw,
    "schedule": check_schedule,
    "sample_ddpm": check_sample_ddpm,
    "sample_ddpm_guidance": check_sample_ddpm_guidance,
    "sample_ddim": check_sample_ddim,
    "colorfix": lambda official, _: check_colorfix(official.folder),
    "degradation": lambda official, _: check_degradation(official.folder),
    "train_loss": check_train_loss,
    "tiles": lambda official, _: check_tiles(official.folder),
    "sample_canvas": check_sample_canvas,
}

SHAPES = "shapes.json"
NOT_QUANTITIES = {"config.json", SHAPES, *(f"weights_{name}.safetensors" for name in ("unet", "structcond", "cfw"))}


@torch.no_grad()
def check_folder(folder: Path) -> Iterator[Quantity]:
    """Every quantity of every reference file in the folder; an infinite difference for what is not understood."""
    official = Official(folder)
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        name = path.name.removesuffix(".safetensors")
        if path.name in NOT_QUANTITIES:
            continue
        if name not in CHECKS:
            yield f"{name} (not understood)", float("inf"), 0.0
            continue
        try:
            yield from CHECKS[name](official, name)
        except MissingInput as missing:
            logger.warning("%s: not checked, %s is absent", name, missing)
