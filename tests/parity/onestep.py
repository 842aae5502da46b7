"""One-step restorers against what the released programs gave: the layout of `goldens/onestep`, any width and rank.

A folder of a system holds `base/`, the weights in their released format, `cases.json`, and for each case a picture
`lq_<case>.png` and the tensors `case_<case>.safetensors`. What the released programs do around the networks (how they
bring a picture to size, cut windows and write 8 bits) is repeated here, with its defects. A reference tensor that no
check compares is reported with an infinite difference.
"""

import json
import math
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from stablesr_kit.checkpoints import Hints, inspect_checkpoint
from stablesr_kit.checkpoints.assembling import AssemblyOptions
from stablesr_kit.checkpoints.base import BaseNetworks
from stablesr_kit.checkpoints.canonical import section
from stablesr_kit.checkpoints.detecting import Family, Prediction
from stablesr_kit.checkpoints.one_step import join, noise_predictor_hints
from stablesr_kit.errors import CheckpointError
from stablesr_kit.imaging.canvas import Region
from stablesr_kit.imaging.color_fix import adain_color_fix, wavelet_color_fix, ycbcr_color_fix
from stablesr_kit.pipelines.one_step import OneStepPipeline
from stablesr_kit.tiling.autoencoder import TiledAutoencoder
from stablesr_kit.tiling.latents import Aggregation, TileGrid, cover, gaussian_weights, merge
from tests.parity.references import Quantity, difference

RELATIVE = 2e-5
LEVELS_OFF = 1e-3
"""Of 8-bit values, the share that may be off, since truncating makes a level of any rounding."""
INPUTS = ("posterior_noise", "window_noise", "pred_noise", "vae_noise")


class Case(NamedTuple):
    """A picture that a released program restored."""

    name: str
    settings: dict[str, Any]
    """Of its system, and over them its own."""
    folder: Path
    reference: dict[str, Tensor]
    text: str | None
    """None is the model's own."""

    def picture(self) -> Image.Image:
        """The LQ picture."""
        return Image.open(self.folder / f"lq_{self.name}.png").convert("RGB")

    def draw(self, mean: Tensor, std: Tensor, noise: str) -> Tensor:
        """The posterior's draw that the program made, or its mode.

        Raises:
            Undrawn: it drew, and what is not here.
        """
        if noise in self.reference:
            return mean + std * self.reference[noise]
        if self.settings.get("latent", "sampled") == "mode":
            return mean
        raise Undrawn


class Undrawn(Exception):
    """A reference lacks the noise that what comes after it depends on."""


def check_folder(folder: Path) -> Iterator[Quantity]:
    """Every quantity of every system in the folder, or of the one whose folder it is; infinity for what is not
    understood."""
    if not folder.is_dir():
        return
    with torch.no_grad():
        if (folder / "cases.json").exists():
            yield from check_system(folder)
            return
        for path in sorted(folder.iterdir()):
            if (path / "cases.json").exists():
                yield from check_system(path)
            elif (path / "case.safetensors").exists() and (path / "vae").is_dir():
                yield from check_vae_hook(path)
            elif path.is_dir() and {file.suffix for file in path.iterdir()} == {".txt"}:
                yield from check_key_lists(path)
            elif path.suffix != ".md":
                yield f"{path.name} (not understood)", math.inf, 0.0


def check_system(folder: Path) -> Iterator[Quantity]:
    """Every quantity of a restorer, which its weights tell."""
    settings = json.loads((folder / "cases.json").read_text())
    cases = settings.pop("cases")
    prompts = json.loads((folder / "prompts.json").read_text()) if (folder / "prompts.json").exists() else {}
    known = {"base", "cases.json", "prompts.json", "noise_predictor_config.json", "README.md"}
    weights = [path for path in folder.iterdir() if path.suffix in (".pkl", ".pth")]
    known |= {path.name for path in weights}
    known |= {file for name in cases for file in (f"case_{name}.safetensors", f"lq_{name}.png")}
    for path in sorted(folder.iterdir()):
        if path.name not in known:
            yield f"{folder.name}.{path.name} (not understood)", math.inf, 0.0
    if len(weights) != 1:
        yield f"{folder.name} ({len(weights)} files of weights)", math.inf, 0.0
        return
    config = folder / "noise_predictor_config.json"
    hints = noise_predictor_hints(config) if config.exists() else None
    pipeline = OneStepPipeline.from_original(weights[0], base=folder / "base", hints=hints)
    pipeline.register_to_config(margin_px=0)  # the references have none
    pipeline.set_progress_bar_config(disable=True)
    run = RUNS[inspect_checkpoint(weights[0]).kind]
    """Fills a dictionary with what the reference may hold, in the order in which it comes to be."""
    for name, own in cases.items():
        path = folder / f"case_{name}.safetensors"
        if path.exists():
            text = prompts.get(name, prompts.get("positive"))
            case = Case(name, settings | own, folder, load_file(path), text)
            ours: dict[str, Tensor] = {}
            reference = case.reference
            try:
                run(pipeline, case, ours)
            except Undrawn:  # the rest of this case cannot be told
                reference = {key: tensor for key, tensor in reference.items() if key in ours}
            yield from compare(f"{folder.name}.{name}", reference, ours)


def compare(name: str, reference: dict[str, Tensor], ours: dict[str, Tensor]) -> Iterator[Quantity]:
    """One quantity per reference output, two for pictures of 8 bits: how far a level is off, and how many are."""
    for key in sorted(reference.keys() - set(INPUTS)):
        expected, found = reference[key], ours.get(key)
        if found is None:
            yield f"{name}.{key}", math.inf, 0.0
        elif key.startswith("out_u8"):
            most = 1.0 if key in ("out_u8", "out_u8_nofix") else 2.0
            off = difference(found, expected)
            yield f"{name}.{key}", off, most
            share = (found != expected).double().mean().item() if math.isfinite(off) else math.inf
            yield f"{name}.{key} (share of values)", share, LEVELS_OFF
        else:
            tolerance = RELATIVE * expected.abs().max().item() if expected.is_floating_point() else 0.0
            yield f"{name}.{key}", difference(found, expected), tolerance


# What all of them share


def text_of(pipeline: OneStepPipeline, text: str | None) -> dict[str, Tensor]:
    """Tokens and embedding; None is the model's own text."""
    embeds = pipeline.encode_prompt(None if text is None else [text])
    text = pipeline.default_prompt.config.text if text is None else text
    tokens = pipeline.tokenizer(text, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    return {"input_ids": tokens.input_ids, "prompt_embeds": embeds}


def posterior(vae: AutoencoderKL, image: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation."""
    distribution = vae.encode(image).latent_dist
    return distribution.mean, distribution.std


def unit_of(picture: Image.Image) -> Tensor:
    """(1, 3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255


def truncated(unit: Tensor) -> Tensor:
    """uint8 (H, W, 3) of values in [0, 1], as ToPILImage makes them."""
    return unit.clamp(0, 1).mul(255).byte()[0].permute(1, 2, 0)


def as_unit(levels: Tensor) -> Tensor:
    """(1, 3, H, W) in [0, 1] of uint8 (H, W, 3)."""
    return levels.permute(2, 0, 1)[None].float() / 255


# PiSA-SR and OSEDiff


def run_tagged(pipeline: OneStepPipeline, case: Case, ours: dict[str, Tensor]) -> None:
    """PiSA-SR and OSEDiff, which share everything but what the UNet predicts and a few defects."""
    is_pisa = pipeline.unet_pix is not None
    picture = case.picture()
    prepared, is_small = prepare(picture, case.settings["upscale"], case.settings["process_size"])
    lq = unit_of(prepared) * 2 - 1
    mean, std = posterior(pipeline.vae, lq)
    ours |= {"lq_u8": torch.from_numpy(np.array(prepared)), "lq": lq, "posterior_mean": mean, "posterior_std": std}
    ours |= text_of(pipeline, case.text)
    ours["z"] = z = case.draw(mean, std, "posterior_noise") * pipeline.vae.config.scaling_factor
    (timestep,) = pipeline.get_timesteps()
    predict = partial(pipeline.predict, timestep=timestep)

    size = (z.shape[-2], z.shape[-1])
    tile, overlap = case.settings.get("tile", 96), case.settings.get("overlap", 32)
    grid = None
    weights = partial(gaussian_weights, official_quirks=not is_pisa)
    if size[0] * size[1] > tile**2:
        side = min(tile, *size)
        grid = TileGrid(tile=(side, side), overlap=overlap)
        tiles = sorted(cover(*size, grid.tile, overlap), key=lambda one: (one.left, one.top))
        ours["tile_xy"] = torch.tensor([[one.left, one.top] for one in tiles])
        ours["tile_weights_f64"] = weights(side, side)
        for key, strengths in (("tile_out", {}), ("tile_out_pix", {"lambda_sem": 0.0})):
            parts = [
                predict(latents=one.crop(z), prompt_embeds=ours["prompt_embeds"], **(strengths if is_pisa else {}))
                for one in tiles
            ]
            ours[key] = torch.cat(parts)
    aggregation = Aggregation(size, grid, 1, z.device, z.dtype, weights=weights)

    def restored(suffix: str = "", **strengths: float) -> None:
        prediction = aggregation.predict(partial(predict, **strengths), z, z, ours["prompt_embeds"], 0)
        x0 = pipeline.denoised(z, prediction, timestep)
        decoded = pipeline.vae.decode(x0 / pipeline.vae.config.scaling_factor).sample
        if is_small and is_pisa:
            size = tuple(int(case.settings["upscale"] * side) for side in picture.size)
            shrink = partial(Image.Image.resize, size=size)
        else:
            shrink = None
        ours["residual" + suffix if is_pisa else "eps"] = prediction
        for fix, levels in fixes(truncated(decoded.clamp(-1, 1) * 0.5 + 0.5), ours["lq_u8"]).items():
            if shrink is not None:
                levels = torch.from_numpy(np.array(shrink(Image.fromarray(levels.numpy()))))
            ours[f"out_u8_{fix}{suffix}"] = levels
        if not suffix:
            ours.update(x0=x0, decoded=decoded, z_decoder_in=x0 / pipeline.vae.config.scaling_factor)

    restored()
    if is_pisa:
        ours["unet_pix"] = predict(latents=z, prompt_embeds=ours["prompt_embeds"], lambda_sem=0.0)
        ours["unet_pixsem"] = predict(latents=z, prompt_embeds=ours["prompt_embeds"])
        pairs = {match.group(1, 2) for key in case.reference if (match := re.search(r"_pix(.+)_sem(.+)", key))}
        for pix, sem in sorted(pairs):
            restored(f"_pix{pix}_sem{sem}", lambda_pix=float(pix), lambda_sem=float(sem))
    content, style = as_unit(case.reference.get("out_u8_nofix", ours["out_u8_nofix"])), unit_of(prepared)
    if content.shape == style.shape:
        ours["adain_float"] = adain_color_fix(content, style)
        ours["wavelet_float"] = wavelet_color_fix(content, style)


def prepare(picture: Image.Image, upscale: int, process_size: int) -> tuple[Image.Image, bool]:
    """The picture that PiSA-SR and OSEDiff work on, and whether it was enlarged more than asked."""
    least = process_size // upscale
    is_small = min(picture.size) < least
    if is_small:
        scale = least / min(picture.size)
        picture = picture.resize((int(scale * picture.width), int(scale * picture.height)))
    picture = picture.resize((picture.width * upscale, picture.height * upscale))
    return picture.resize((picture.width // 8 * 8, picture.height // 8 * 8), Image.Resampling.LANCZOS), is_small


def fixes(levels: Tensor, reference: Tensor) -> dict[str, Tensor]:
    """8-bit pictures of the three colour options."""
    content, style = as_unit(levels), as_unit(reference)
    return {
        "nofix": levels,
        "adain": truncated(adain_color_fix(content, style)),
        "wavelet": truncated(wavelet_color_fix(content, style)),
    }


# HYPIR


def run_hypir(pipeline: OneStepPipeline, case: Case, ours: dict[str, Tensor]) -> None:
    """Three stages in windows, each blended with the lopsided gaussian."""
    patch_px, stride_px = case.settings["patch_size"], case.settings["stride"]
    scaling, factor = pipeline.vae.config.scaling_factor, pipeline.vae_scale_factor
    patch, overlap = patch_px // factor, (patch_px - stride_px) // factor
    weights = partial(gaussian_weights, official_quirks=True)
    lq = unit_of(case.picture())
    reference = F.interpolate(lq, enlarged_size(lq, case.settings), mode="bicubic")
    grown = reference
    if min(grown.shape[-2:]) <= patch_px:
        ratio = patch_px / min(grown.shape[-2:])
        size = tuple(patch_px if side == min(grown.shape[-2:]) else int(side * ratio) for side in grown.shape[-2:])
        grown = F.interpolate(grown, size, mode="bicubic", antialias=True)
    height, width = grown.shape[-2:]
    vae_in = F.pad(grown * 2 - 1, (0, -width % 8, 0, -height % 8))

    tiles_px = cover(vae_in.shape[-2], vae_in.shape[-1], (patch_px, patch_px), patch_px - stride_px)
    size = (vae_in.shape[-2] // factor, vae_in.shape[-1] // factor)
    tiles = cover(*size, (patch, patch), overlap)
    coded = [posterior(pipeline.vae, tile.crop(vae_in)) for tile in tiles_px]
    mean, std = (torch.cat(part) for part in zip(*coded, strict=True))
    ours |= text_of(pipeline, case.text)
    ours |= {"vae_in": vae_in, "ref": reference, "window_mean": mean, "window_std": std}
    ours |= {"enc_windows_y0y1x0x1": boxes(tiles_px), "lat_windows_y0y1x0x1": boxes(tiles)}
    ours["weights_latent_f64"] = weights(patch, patch)
    ours["z_unscaled"] = z = merge(tiles, case.draw(mean, std, "window_noise").split(1), weights)

    (timestep,) = pipeline.get_timesteps()
    predict = partial(pipeline.predict, timestep=timestep)
    latents = z * scaling
    aggregation = Aggregation(
        size, TileGrid(tile=(patch, patch), overlap=overlap), 1, z.device, z.dtype, weights=weights
    )
    eps = aggregation.predict(predict, latents, latents, ours["prompt_embeds"], 0)
    x0 = pipeline.denoised(latents, eps, timestep) / scaling
    decoded = merge(tiles_px, [pipeline.vae.decode(tile.crop(x0)).sample for tile in tiles], weights)
    cut = decoded[..., :height, :width] * 0.5 + 0.5
    back = F.interpolate(cut, reference.shape[-2:], mode="bicubic", antialias=True)
    out = wavelet_color_fix(back, reference).clamp(0, 1)
    windows = [tile.crop(latents) for tile in tiles]
    ours["window_z_scaled"] = torch.cat(windows)
    ours["window_eps"] = torch.cat([predict(latents=one, prompt_embeds=ours["prompt_embeds"]) for one in windows])
    ours |= {"x0_unscaled": x0, "decoded": decoded, "resized_back": back, "out": out, "out_u8": truncated(out)}


def enlarged_size(lq: Tensor, settings: dict[str, Any]) -> tuple[int, int]:
    """Height and width by a factor, or by the longest side."""
    height, width = lq.shape[-2:]
    if "target_longest_side" not in settings:
        return height * settings["upscale"], width * settings["upscale"]
    longest = settings["target_longest_side"]
    ratio = longest / max(height, width)
    return (longest, int(width * ratio)) if height > width else (int(height * ratio), longest)


def boxes(tiles: list[Region]) -> Tensor:
    return torch.tensor([[tile.top, tile.bottom, tile.left, tile.right] for tile in tiles])


# InvSR


def run_invsr(pipeline: OneStepPipeline, case: Case, ours: dict[str, Tensor]) -> None:
    """Every window of LQ pixels is restored by itself; the results are blended as pixels."""
    side, scale = case.settings["pch"], case.settings["sf"]
    scaling = pipeline.vae.config.scaling_factor
    picture = unit_of(case.picture())
    (padded, (top, left)) = padded_to_window(picture, side)
    height, width = padded.shape[-2:]
    tiles = [Region(y, x, y + side, x + side) for y in split_starts(height, side) for x in split_starts(width, side)]
    patches = torch.cat([tile.crop(padded) for tile in tiles])
    up = F.interpolate(patches, scale_factor=scale, mode="bicubic") * 2 - 1
    vae_mean, vae_std = posterior(pipeline.vae, up)
    # The program takes one from every nominal timestep.
    timesteps = pipeline.get_timesteps(timesteps=[t - 1 for t in case.settings["timesteps"]])
    predicted = DiagonalGaussianDistribution(pipeline.noise_predictor(patches * 2 - 1, timesteps[0]))
    sigmas = [((1 - a) / a).sqrt() for a in pipeline.scheduler.alphas_cumprod[timesteps]]
    ours |= {"padded_lq": padded, "patch_lq": patches, "patch_up": up, "vae_mean": vae_mean, "vae_std": vae_std}
    ours |= {"patch_xy": torch.tensor([[tile.left, tile.top] for tile in tiles])}
    ours |= {"pred_mean": predicted.mean, "pred_std": predicted.std, "sigmas": torch.tensor([*sigmas, 0.0])}
    ours |= {"timesteps_fed": torch.tensor(timesteps, dtype=torch.float32)}
    ours |= {"weights_f64_1d": opencv_gaussian(side * scale)}
    ours |= text_of(pipeline, case.text)
    z = case.draw(vae_mean, vae_std, "vae_noise") * scaling
    x = pipeline.noised(z, case.draw(predicted.mean, predicted.std, "pred_noise"), timesteps[0])
    ours["latents_start"] = x * (sigmas[0] ** 2 + 1).sqrt()
    for i, t in enumerate(timesteps):
        eps = pipeline.predict(latents=x, timestep=t, prompt_embeds=ours["prompt_embeds"])
        ours |= {f"unet_in_{i}": x, f"unet_eps_{i}": eps}
        x0 = pipeline.denoised(x, eps, t)
        x = x0 if t == timesteps[-1] else pipeline.noised(x0, eps, timesteps[i + 1])
    ours["latents_final"] = x
    ours["decoded"] = torch.cat([pipeline.vae.decode(one / scaling).sample for one in x.split(1)])

    large = [Region(*(edge * scale for edge in tile)) for tile in tiles]
    unit = (ours["decoded"] * 0.5 + 0.5).clamp(0, 1)
    merged = merge(large, unit.split(1), lambda high, wide: torch.outer(opencv_gaussian(high), opencv_gaussian(wide)))
    high, wide = (edge * scale for edge in picture.shape[-2:])
    merged = merged[..., top * scale : top * scale + high, left * scale : left * scale + wide]
    fix = case.settings["color_fix"]
    if fix is not None:
        reference = F.interpolate(padded, (high, wide), mode="bicubic", antialias=True)
        merged = {"wavelet": wavelet_color_fix, "ycbcr": ycbcr_color_fix}[fix](merged, reference)
    ours["out_float"] = merged.clamp(0, 1)[0].permute(1, 2, 0)
    ours["out_u8"] = ours["out_float"].mul(255).round().byte()


def padded_to_window(picture: Tensor, side: int) -> tuple[Tensor, tuple[int, int]]:
    """The LQ picture as InvSR cuts it into windows, and where in it the picture begins."""
    starts = [0, 0]
    if tuple(picture.shape[-2:]) == (side, side):
        return picture, (0, 0)
    for axis in (0, 1):
        while picture.shape[2 + axis] < side:
            length = picture.shape[2 + axis]
            lacking = min(side - length, 2 * (length - 1))
            before, after = lacking // 2, lacking - lacking // 2
            starts[axis] += before
            sides = (0, 0, before, after) if axis == 0 else (before, after, 0, 0)
            picture = F.pad(picture, sides, mode="reflect")
    height, width = picture.shape[-2:]
    return F.pad(picture, (0, -width % 16, 0, -height % 16), mode="reflect"), (starts[0], starts[1])


def split_starts(length: int, side: int) -> list[int]:
    """Where windows begin: every half of one, none reaching beyond the end."""
    return list(dict.fromkeys(max(min(start, length - side), 0) for start in range(0, length, side // 2)))


def opencv_gaussian(length: int) -> Tensor:
    """OpenCV's kernel of its own width, float64; of an even length, that of one more without its first value."""
    odd = length + 1 if length % 2 == 0 else length
    sigma = 0.3 * ((length - 1) * 0.5 - 1) + 0.8
    x = torch.arange(odd, dtype=torch.float64) - (odd - 1) / 2
    kernel = (-(x**2) / (2 * sigma**2)).exp()
    return (kernel / kernel.sum())[odd - length :]


RUNS: dict[str, Callable[[OneStepPipeline, Case, dict[str, Tensor]], None]] = {
    "pisa-sr": run_tagged,
    "osediff": run_tagged,
    "hypir": run_hypir,
    "invsr": run_invsr,
}


# The tiled autoencoder of PiSA-SR and OSEDiff, which ours is not: see `TiledAutoencoder`


def check_vae_hook(folder: Path) -> Iterator[Quantity]:
    """The autoencoder as a whole, in our exact tiles, and in theirs, which miss the whole by a lot."""
    vae = AutoencoderKL.from_pretrained(folder / "vae").eval()
    reference = load_file(folder / "case.safetensors")
    ours: dict[str, Tensor] = {}
    if "image_u8" in reference:
        image = as_unit(reference["image_u8"]) * 2 - 1
        ours["lq"] = image
        ours["moments_plain"] = vae.quant_conv(vae.encoder(image))
        if "enc_in_boxes_x0x1y0y1" in reference:
            ours["moments_tiled"] = vae.quant_conv(pooled(vae.encoder, image, reference, "enc"))
    if "latent_unscaled" in reference:
        z = reference["latent_unscaled"]
        ours["decoded_plain"] = vae.decode(z).sample
        if "dec_in_boxes_x0x1y0y1" in reference:
            ours["decoded_tiled"] = pooled(vae.decoder, vae.post_quant_conv(z), reference, "dec")
    given = {key for key in reference if key.endswith(("_tile", "_boxes_x0x1y0y1"))} | {"image_u8", "latent_unscaled"}
    outputs = {key: tensor for key, tensor in reference.items() if key not in given}
    yield from compare(folder.name, outputs, ours)
    exact = TiledAutoencoder(vae, tile_px=64)
    for key, run, source in (("moments_plain", exact.encode, "lq"), ("decoded_plain", exact.decode, "latent_unscaled")):
        if key in outputs and source in (ours | reference):
            tiled = run((ours | reference)[source]).to_tensor()
            tolerance = RELATIVE * outputs[key].abs().max().item()
            yield f"{folder.name}.{key} (exact tiles)", difference(tiled, outputs[key]), tolerance


def pooled(coder: nn.Module, whole: Tensor, reference: dict[str, Tensor], which: str) -> Tensor:
    """Encoder or decoder in padded tiles that share the statistics of each group norm: the means of their means and of
    their variances, by their areas. What tiles differ by is left out, and attention sees one tile."""
    tiles = [x0x1y0y1(box) for box in reference[f"{which}_in_boxes_x0x1y0y1"]]
    parts = [x0x1y0y1(box) for box in reference[f"{which}_out_boxes_x0x1y0y1"]]
    together = threading.Barrier(len(tiles))  # a thread per tile, all at the same norm
    local = threading.local()
    means, variances, areas = ([torch.empty(0)] * len(tiles) for _ in range(3))

    def normalise(norm: nn.GroupNorm, inputs: tuple[Tensor], _output: Tensor) -> Tensor:
        (x,) = inputs
        groups = x.reshape(norm.num_groups, -1)
        variances[local.tile], means[local.tile] = torch.var_mean(groups, dim=1, correction=0)
        areas[local.tile] = torch.tensor(x[0, 0].numel())
        together.wait()
        weights = torch.stack(areas) / sum(areas)
        mean, var = ((weights[:, None] * torch.stack(one)).sum(0)[:, None] for one in (means, variances))
        together.wait()  # before the next norm's take their place
        channels = (1, -1) + (1,) * (x.ndim - 2)
        normed = ((groups - mean) / (var + norm.eps).sqrt()).reshape(x.shape)
        return normed * norm.weight.view(channels) + norm.bias.view(channels)

    @torch.no_grad()  # a thread does not know what the others' mode is
    def run(tile: int) -> Tensor:
        local.tile = tile
        try:
            return coder(tiles[tile].crop(whole))
        except BaseException:
            together.abort()
            raise

    norms = [module for module in coder.modules() if isinstance(module, nn.GroupNorm)]
    hooks = [norm.register_forward_hook(normalise) for norm in norms]
    with ThreadPoolExecutor(len(tiles)) as threads:
        outputs = list(threads.map(run, range(len(tiles))))
    for hook in hooks:
        hook.remove()

    scale = outputs[0].shape[-1] / tiles[0].width
    result = torch.zeros(*outputs[0].shape[:2], parts[-1].bottom, parts[-1].right)
    for tile, part, output in zip(tiles, parts, outputs, strict=True):
        start = Region(*(int(edge * scale) for edge in tile))
        part.crop(result).copy_(part.cut_from(output, start))
    return result


def x0x1y0y1(box: Tensor) -> Region:
    """A region from the order of a reference."""
    left, right, top, bottom = box.tolist()
    return Region(top, left, bottom, right)


# Full size


KEY_LISTS: dict[Family, dict[str, str]] = {
    "pisa-sr": {"pisa_state_dict_unet": "unet."},
    "osediff": {"osediff_state_dict_unet": "unet.", "osediff_state_dict_vae": "vae."},
    "hypir": {"hypir_sd2": ""},
    "invsr": {"invsr_noise_predictor": ""},
}
"""The lists of each released file, and what we put before their names."""


def check_key_lists(folder: Path) -> Iterator[Quantity]:
    """How many tensors of the released files have no place in Stable Diffusion 2.1 at full size, or lack there."""
    lists = {path.stem: path.read_text().splitlines() for path in sorted(folder.glob("*.txt"))}
    base = full_size_base()
    for family, stems in KEY_LISTS.items():
        if stems.keys() <= lists.keys():
            tensors = {
                prefix + name: tensor
                for stem, prefix in stems.items()
                for name, tensor in listed_tensors(lists.pop(stem)).items()
            }
            yield f"{folder.name}.{family} (tensors without a place)", without_place(family, tensors, base), 0.0
    for stem, lines in lists.items():
        if stem.endswith("_modules"):
            network = base.vae if "_vae_" in f"_{stem}" else base.unet
            modules = {name for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
            absent = {line.strip() for line in lines} - modules
            yield f"{folder.name}.{stem} (modules without a place)", float(len(absent)), 0.0
        else:
            yield f"{folder.name}.{stem} (not understood)", math.inf, 0.0


def listed_tensors(lines: list[str]) -> dict[str, Tensor]:
    """Tensors without values of lines with a name, a tab and a shape."""
    pairs = (line.split("\t") for line in lines)
    return {name: torch.empty([int(side) for side in shape.split(",")], device="meta") for name, shape in pairs}


def full_size_base() -> BaseNetworks:
    """Stable Diffusion 2.1 without values."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64, cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True
        )
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )
    certain = Prediction("epsilon", "of the release", is_certain=True)
    return BaseNetworks(unet=unet, vae=vae, text_encoder=None, tokenizer=None, prediction=certain)


def without_place(family: Family, tensors: dict[str, Tensor], base: BaseNetworks) -> float:
    """How many tensors a conversion complains of."""
    try:
        join(section(Path(family), tensors), family, base, DDPMScheduler(), Hints(), AssemblyOptions())
    except CheckpointError as error:
        return float(sum(len(note.splitlines()) for note in error.__notes__))
    return 0.0
