"""StableSR against reference outputs of the official modules: the layout of `goldens/stablesr`, any config and seed.

Each check takes the folder and the networks built from its official weights, and yields (quantity, max |difference|,
tolerance). A reference tensor that no check compares is reported with an infinite difference.
"""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
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
from tests.parity.references import Quantity, difference, metadata
from tests.parity.stablesr_colorfix import check_colorfix
from tests.parity.stablesr_degradation import check_degradation
from tests.parity.stablesr_tiles import check_tiles

MODULE = 2e-5
LOSS = 1e-5


def compare(name: str, reference: dict[str, Tensor], ours: dict[str, Tensor], tolerance: float) -> Iterator[Quantity]:
    """One quantity per reference output; infinity for one that is not ours."""
    for key in sorted(key for key in reference if not key.startswith("in_")):
        yield f"{name}.{key}", difference(ours[key], reference[key]) if key in ours else float("inf"), tolerance


class Official(NamedTuple):
    """A folder of references, with the pipeline built from its weights."""

    folder: Path
    config: dict[str, Any]
    pipeline: StableSRPipeline

    def file(self, name: str) -> dict[str, Tensor]:
        return {
            key: tensor.float() if tensor.dtype == torch.float16 else tensor
            for key, tensor in load_file(self.folder / f"{name}.safetensors").items()
        }

    def compare_samples(self, name: str, reference: dict[str, Tensor], ours: dict[str, Tensor]) -> Iterator[Quantity]:
        """One quantity per sampled output; rounding grows with the result, and more so where the UNet predicts eps."""
        relative = {"eps": 2e-5, "v": 1e-5}[self.config["parameterization"]]
        for key in sorted(key for key in reference if key.startswith("out")):
            found = difference(ours[key], reference[key]) if key in ours else float("inf")
            yield f"{name}.{key}", found, relative * reference[key].abs().max().item()


def open_official(folder: Path) -> Official:
    """Read the folder's config and weights. Weights that only `shapes.json` lists are zero: a compact folder holds
    no more than its quantities depend on."""
    config = json.loads((folder / "config.json").read_text())
    listed = json.loads((folder / SHAPES).read_text()) if (folder / SHAPES).exists() else {}
    weights = {}
    for part, name in {"unet": "unet", "encoder": "structcond", "cfw": "cfw"}.items():
        absent = {key: torch.zeros(shape) for key, shape in listed.get(name, {}).items()}
        weights[part] = absent | load_file(folder / f"weights_{name}.safetensors")
    return Official(folder, config, StableSRPipeline(**load_official(config, **weights)))


def check_structcond(official: Official, name: str) -> Iterator[Quantity]:
    """Features of the time-aware encoder, which the reference names by their width."""
    reference = official.file(name)
    features = official.pipeline.adapter.encode(reference["in_latent"], reference["in_timesteps"])
    yield from compare(name, reference, {f"out_{f.shape[-1]}": f for f in features}, MODULE)


def check_unet(official: Official, name: str) -> Iterator[Quantity]:
    """The UNet under given features, and a few of its activations."""
    reference = official.file(name)
    pipeline = official.pipeline
    features = [f for key, f in reference.items() if key.startswith("in_struct_")]
    sft = pipeline.adapter.modulate(sorted(features, key=lambda f: -f.shape[-1]))
    seen: dict[str, Tensor] = {}
    first = pipeline.unet.down_blocks[0].resnets[0]
    watched = {
        "dbg_input0": pipeline.unet.conv_in,
        "dbg_input1_res_prespade": first.conv2,
        "resnet": first,
        "dbg_input1": pipeline.unet.down_blocks[0].attentions[0],
        "dbg_middle": pipeline.unet.mid_block,
    }
    hooks = [module.register_forward_hook(remember(seen, key)) for key, module in watched.items()]
    seen["out"] = pipeline.unet(
        reference["in_x"], reference["in_timesteps"], reference["in_context"], timestep_cond=sft
    ).sample
    for hook in hooks:
        hook.remove()
    skip = seen["dbg_input0"] if first.conv_shortcut is None else first.conv_shortcut(seen["dbg_input0"])
    seen["dbg_input1_res_postspade"] = seen["resnet"] - skip
    yield from compare(name, reference, seen, MODULE)


def remember(seen: dict[str, Tensor], key: str) -> Callable[[nn.Module, Any, Any], None]:
    """A forward hook that keeps a module's output."""

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        seen[key] = output if isinstance(output, Tensor) else output[0]

    return hook


def check_cfw(official: Official, name: str) -> Iterator[Quantity]:
    """Posterior, encoder features, decoding at several w, and one fusion layer alone."""
    reference = official.file(name)
    vae, cfw = official.pipeline.vae, official.pipeline.cfw
    posterior, features = encode_with_features(vae, reference["in_image"], tuple(cfw.config.levels))
    ours = {
        "out_moments": posterior.parameters,
        "out_mean": posterior.mean,
        "out_std": posterior.std,
        "out_init_latent": to_latent(posterior.mean + posterior.std * reference["in_eps"], vae),
    }
    ours |= {f"out_enc_fea_{i}": feature for i, (_, feature) in enumerate(sorted(features.items()))}
    if "in_z" in reference:
        ours["out_decoded_plain_kl"] = vae.decode(reference["in_z"]).sample
    last = max(features)
    for key in reference:
        if key.startswith("out_decoded_w"):
            w = float(key.removeprefix("out_decoded_w"))
            ours[key] = decode_with_features(vae, cfw, reference["in_z"], features, w)
        if key.startswith("out_fuse2_w"):
            w = float(key.removeprefix("out_fuse2_w"))
            ours[key] = cfw(last, features[last], reference["in_fuse2_dec_feat"], w)
    yield from compare(name, reference, ours, MODULE)


def check_schedule(official: Official, name: str) -> Iterator[Quantity]:
    """Buffers of the full and the respaced diffusions, of the released DDIM, and noising."""
    reference = official.file(name)
    scheduler = SpacedDDPMScheduler.from_config(official.pipeline.scheduler.config)
    ours = posterior_columns(scheduler, "full")
    for key in reference:
        if key.startswith("s") and key.endswith("_timesteps"):
            steps = int(key[1:].removesuffix("_timesteps"))
            scheduler.set_timesteps(steps)
            ours |= posterior_columns(scheduler, f"s{steps}")
        if key.startswith("ddim") and key.endswith("_sigmas"):
            steps, eta = key[4:].removesuffix("_sigmas").split("_eta")
            ours |= official_ddim_columns(scheduler.config, int(steps), eta)
        if key.startswith("qsample_t"):
            t = torch.full((len(reference["qsample_in_noise"]),), int(key.removeprefix("qsample_t")))
            ours[key] = scheduler.add_noise(reference["qsample_in_latent"], reference["qsample_in_noise"], t)
    for key in sorted(reference.keys() - {"qsample_in_latent", "qsample_in_noise"}):
        expected = reference[key]
        tolerance = 2e-5 * max(expected.abs().max().item(), 1.0) if expected.is_floating_point() else 0.0
        yield f"{name}.{key}", difference(ours[key], expected) if key in ours else float("inf"), tolerance


def posterior_columns(scheduler: SpacedDDPMScheduler, prefix: str) -> dict[str, Tensor]:
    """The scheduler's coefficients under the official names."""
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
    return {f"{prefix}_{key}": column for key, column in columns.items()}


def official_ddim_columns(config: Any, steps: int, eta: str) -> dict[str, Tensor]:
    """The released DDIM's alphas and sigmas under the official names."""
    scheduler = SpacedDDIMScheduler.from_config(config, official_quirks=True)
    scheduler.set_timesteps(steps)
    alphas, alphas_prev = scheduler.ddim_alphas()
    columns = {
        "spaced_timesteps_fed_to_net": scheduler.timesteps.flip(0),
        "uniform_timesteps": torch.arange(0, 1000, 1000 // steps),
        "alphas": alphas,
        "alphas_prev": alphas_prev.double(),
        "sigmas": ddim_sigma(alphas.double(), alphas_prev.double(), float(eta)),
        "sqrt_one_minus_alphas": (1 - alphas).sqrt(),
    }
    return {f"ddim{steps}_eta{eta}_{key}": column for key, column in columns.items()}


class Trajectory(NamedTuple):
    """A sampling run: x and x0 after each step, (steps, B, C, h, w)."""

    x: Tensor
    x0: Tensor


def sample(
    official: Official,
    reference: dict[str, Tensor],
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


def spaced(official: Official, reference: dict[str, Tensor]) -> SpacedDDPMScheduler:
    """The DDPM scheduler with as many steps as the reference has noises."""
    scheduler = SpacedDDPMScheduler.from_config(official.pipeline.scheduler.config)
    scheduler.set_timesteps(len(reference["in_step_noises"]))
    return scheduler


def check_sample_ddpm(official: Official, name: str) -> Iterator[Quantity]:
    """Respaced DDPM from the noised LQ latent, and the decoding of its result with CFW."""
    reference = official.file(name)
    scheduler = spaced(official, reference)
    run = sample(official, reference, scheduler)
    ours = {"out_traj": run.x, "out": run.x[-1]} | {f"out_x0_step{i}": x0 for i, x0 in enumerate(run.x0)}
    features = official.pipeline.encode([View(one) for one in reference["in_lq_image"].split(1)])[1]
    for key in reference:
        if key.startswith("out_decoded_w"):
            w = float(key.removeprefix("out_decoded_w"))
            ours[key] = assembled(official.pipeline.decode(reference["out"][:1], features, w)[0])
    yield (
        f"{name}.in_timesteps",
        difference(scheduler.timesteps, reference["in_timesteps"].sort(descending=True)[0]),
        0.0,
    )
    yield from official.compare_samples(name, reference, ours)


def check_sample_ddpm_guidance(official: Official, name: str) -> Iterator[Quantity]:
    """Respaced DDPM with classifier-free guidance, and with a reference latent."""
    reference = official.file(name)
    about = metadata(official.folder / f"{name}.safetensors")
    settings = about["reference"]
    first, last = settings["range"]

    def towards_reference(denoised: Tensor, index: int) -> Tensor:
        if not first <= index <= last:
            return denoised
        return towards(denoised, reference["in_reference_latent"], settings["lr"], settings["step"])

    scheduler = spaced(official, reference)
    ours = {
        "out": sample(official, reference, scheduler, about["scale"]).x[-1],
        "out_reference": sample(official, reference, scheduler, denoised_fn=towards_reference).x[-1],
    }
    yield from official.compare_samples(name, reference, ours)


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
    scheduler = SpacedDDIMScheduler.from_config(official.pipeline.scheduler.config, official_quirks=True)
    scheduler.set_timesteps(len(reference["in_step_noises"]))
    ours = {
        "out": sample(official, reference, scheduler, about["scale"], eta=about["eta"]).x[-1],
        "out_noguidance": sample(official, reference, scheduler, eta=about["eta"]).x[-1],
    }
    if "canvas_in_x_T" in reference:
        on_canvas = {
            key.removeprefix("canvas_"): value for key, value in reference.items() if key.startswith("canvas_")
        }
        run = sample(official, on_canvas, scheduler, about["scale"], official_grid(about), eta=about["eta"])
        ours["out_canvas"] = run.x[-1]
    yield (
        f"{name}.in_timesteps_fed",
        difference(scheduler.timesteps.sort()[0], reference["in_timesteps_fed"].sort()[0]),
        0.0,
    )
    yield from official.compare_samples(name, reference, ours)


def check_train_loss(official: Official, name: str) -> Iterator[Quantity]:
    """One training loss; in a compact folder of the stored prediction, since the UNet's weights are not all there."""
    reference = official.file(name)
    pipeline = official.pipeline
    timestep = reference["in_t"]
    x, target = hide_in_noise(reference["in_z_gt"], reference["in_noise"], timestep, pipeline.scheduler)
    ours = {"out_x_noisy": x, "out_target": target}
    if "in_pred" in reference:
        prediction = reference["in_pred"]
    else:
        sft = pipeline.adapter(reference["in_z_lq"], timestep)
        prediction = pipeline.unet(x, timestep, reference["in_context"], timestep_cond=sft, return_dict=False)[0]
        ours["out_pred"] = prediction
    loss = denoising_loss(prediction, target, timestep, pipeline.scheduler)
    yield f"{name}.out_loss", difference(loss, reference.pop("out_loss")), LOSS
    yield from compare(name, reference, ours, MODULE)


def check_sample_canvas(official: Official, name: str) -> Iterator[Quantity]:
    """Aggregation sampling: respaced DDPM on a canvas larger than a tile."""
    reference = official.file(name)
    grid = official_grid(metadata(official.folder / f"{name}.safetensors"))
    run = sample(official, reference, spaced(official, reference), grid=grid)
    for key, length in (("tile_y_offsets", run.x.shape[-2]), ("tile_x_offsets", run.x.shape[-1])):
        found = torch.tensor(tile_offsets(length, grid.tile[0], grid.overlap))
        yield f"{name}.{key}", difference(found, reference[key]), 0.0
    ours = {"out": run.x[-1], "out_step0": run.x[0], "out_step0_x0": run.x0[0]}
    yield from official.compare_samples(name, reference, ours)


def official_grid(about: dict[str, Any]) -> TileGrid:
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
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    checked = [name.removesuffix(".safetensors") for name in names if name not in NOT_QUANTITIES]
    if not checked:
        return
    official = open_official(folder)
    for name in checked:
        if name in CHECKS:
            yield from CHECKS[name](official, name)
        else:
            yield f"{name} (not understood)", float("inf"), 0.0
