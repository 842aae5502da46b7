"""Train a StableSR that needs one, two or four steps, with losses on pictures and on scores.

    accelerate launch training/train_few_step.py --config configs/mini/few_step.yaml

The student starts as a copy of the pipeline and runs like it: from the noised LQ latent through evenly spaced DDIM
steps, and through the decoder. The result is the same kind of pipeline, with fewer steps by default.
"""

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn

from stablesr_kit.checkpoints.networks import embed_empty_prompt
from stablesr_kit.errors import ConfigError
from stablesr_kit.evaluation.quality import Quality
from stablesr_kit.models.feature_wrapping import (
    ControllableFeatureWrapping,
    decode_with_features,
    encode_with_features,
)
from stablesr_kit.pipelines.stablesr import StableSRPipeline
from stablesr_kit.seeds import stream
from stablesr_kit.spaces import from_latent, image_to_pixels, to_latent, unit_to_image
from stablesr_kit.training.data.computed import CachedPairs
from stablesr_kit.training.data.crops import Purpose, report_skipped
from stablesr_kit.training.data.options import PairOptions
from stablesr_kit.training.data.pairs import open_pairs
from stablesr_kit.training.losses.adversarial import AdversarialOptions, Adversary
from stablesr_kit.training.losses.denoising import DenoisingOptions, denoising_task, enable_xformers, noise_schedule
from stablesr_kit.training.losses.distillation import (
    consistency_task,
    distribution_matching_loss,
    few_timesteps,
    take_apart,
)
from stablesr_kit.training.losses.perceptual import load_perceptual_loss, shifted
from stablesr_kit.training.losses.pictures import PIXEL_LOSSES, PictureLossOptions, flat_loss, lattice_loss
from stablesr_kit.training.run.command_line import launch
from stablesr_kit.training.run.config import RunConfig
from stablesr_kit.training.run.networks import Weights
from stablesr_kit.training.run.run import TrainingRun
from stablesr_kit.training.run.validation import Example, RestorationValidationOptions, restoration_examples
from stablesr_kit.training.small import build_small_scheduler

Part = Literal["unet", "adapter", "decoder", "cfw"]

LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]
LORA_TARGETS += ["conv_in", "conv_out", "conv1", "conv2", "conv_shortcut", "conv"]
"""Layers of a UNet that get LoRA: all but the time embedding (Wu et al. 2024, OSEDiff)."""


@dataclass(frozen=True, kw_only=True)
class FewStepConfig(
    AdversarialOptions, PictureLossOptions, DenoisingOptions, PairOptions, RestorationValidationOptions, RunConfig
):
    """Options of this program. Two weights in one option are for w = 0 and w = 1, with linear interpolation between."""

    pretrained_model: str
    """Folder of the StableSR pipeline to start from, and to learn from (the teacher)."""
    trained_parts: tuple[Part, ...] = ("unet", "adapter", "decoder", "cfw")
    """Networks that are trained. The encoder is always frozen."""
    lora_rank: int | None = None
    """Rank of the LoRA that is trained instead of the UNet and merged at the end; None trains the whole UNet."""
    cfw_rrdbs: int | None = None
    """Number of RRDBs that the fusion layers grow to, without changing the result at first; None: no growth."""
    student_steps: tuple[Literal[1, 2, 4], ...] = (1,)
    """Numbers of denoising steps, one drawn per training step; the first is the default of the result."""
    w: tuple[float, ...] = (0.0, 0.5, 1.0)
    """Weights of the fusion layers (CFW), one drawn per training step."""
    pairs: str | None = None
    """File written by cache_pairs.py; None degrades photographs on the fly."""
    pixel_weight: float = 1.0
    """Weight of the pixel loss. If all losses on pictures have weight 0, nothing is decoded."""
    perceptual_shift_px: int = 0
    """The perceptual loss sees crops that are smaller by this much, shifted and flipped at random, so that it sees
    periodic patterns at every phase."""
    flat_weights: tuple[float, float] = (0.0, 0.0)
    """Weights of the loss against patterns in flat areas of the photograph."""
    lattice_weights: tuple[float, float] = (0.0, 0.0)
    """Weights of the loss against patterns with a period of 4 pixels, which decoders tend to paint. It pools over the
    batch of a process, so it depends on how a step is split into batches."""
    perceptual_fade: tuple[float, float] = (1.0, 1.0)
    """Factors of the perceptual loss."""
    latent_weight: float = 0.0
    """Weight of the mean squared difference from the HQ latent."""
    adversarial_fade: tuple[float, float] = (1.0, 1.0)
    """Factors of the adversarial loss."""
    adversarial_shift_px: int = 0
    """As perceptual_shift_px, for the discriminator, whose layers of stride 2 have a periodic pattern themselves."""
    distribution_weight: float = 0.0
    """Weight of distribution matching: a second network learns the score of the student's latents, and the student
    is trained until it equals the teacher's score (Yin et al. 2024, DMD2)."""
    fake_learning_rate: float = 5e-5
    """Constant learning rate of that second network."""
    student_every: int = 1
    """The student is trained in every n-th step, the second network in all (DMD2: 5 or 10)."""
    consistency_weight: float = 0.0
    """Weight of latent consistency distillation from the teacher with 50 DDIM steps (Luo et al. 2023, LCM)."""
    velocity_every: int = 0
    """Every n-th step is plain denoising at a random timestep, alternately with and without the adapter, so that the
    UNet remains a diffusion model and other numbers of steps keep working; 0: never."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("trained_parts", "student_steps", "w"):
            if not getattr(self, name):
                raise ConfigError(f"{name} is empty; give at least one")
        if min(self.w) < 0:
            raise ConfigError(f"w={list(self.w)} must be numbers of at least 0")
        if self.cfw_rrdbs is not None and "cfw" not in self.trained_parts:
            raise ConfigError("cfw_rrdbs needs cfw among trained_parts; add it, or leave cfw_rrdbs out")
        for name in ("distribution_weight", "consistency_weight", "velocity_every"):
            if getattr(self, name) and not {"unet", "adapter"} <= set(self.trained_parts):
                raise ConfigError(f"{name} needs unet and adapter among trained_parts; add them, or set it to 0")
        if self.student_every < 1 or (self.student_every > 1 and not self.distribution_weight):
            raise ConfigError(
                f"student_every={self.student_every} must be 1 without distribution_weight, else 1 or more"
            )


class StudentDecoding(nn.Module):
    """The student's decoder: plain at w = 0, with its fusion layers above."""

    def __init__(self, vae: AutoencoderKL, cfw: ControllableFeatureWrapping | None) -> None:
        super().__init__()
        self.vae = vae
        self.cfw = cfw

    def forward(self, z: Tensor, features: dict[int, Tensor], w: float) -> Tensor:
        """Image (B, 3, H, W) of the raw code z (B, C, h, w); arguments as `decode_with_features`."""
        if w == 0 or self.cfw is None:
            return self.vae.decode(z).sample
        return decode_with_features(self.vae, self.cfw, z, features, w)


def main(config: FewStepConfig) -> None:
    """Train, write checkpoints, and save the pipeline with the averaged weights to output_dir/pipeline, in float16."""
    run = TrainingRun(config, some_rest=True)
    device = run.accelerator.device
    data = open_data(config, run)
    pipeline = StableSRPipeline.from_pretrained(config.pretrained_model, dtype=torch.float32)
    unet, adapter, vae, cfw = pipeline.unet, pipeline.adapter, pipeline.vae, pipeline.cfw
    if cfw is None and ("cfw" in config.trained_parts or max(config.w) > 0):
        raise ConfigError(
            f"{config.pretrained_model} has no fusion layers; give trained_parts without cfw and w: [0.0]"
        )
    if cfw is not None and config.cfw_rrdbs is not None:
        cfw = cfw.grown(config.cfw_rrdbs)
    for network in (unet, adapter, vae, cfw):
        if network is not None:
            network.requires_grad_(False).to(device, memory_format=torch.channels_last)
            if config.gradient_checkpointing and network is not vae:  # CFW acts within its forward, which runs once
                network.enable_gradient_checkpointing()
    enable_xformers(config, unet, adapter)
    if config.lora_rank is not None:
        unet.to(run.frozen_dtype)
    levels = () if cfw is None else tuple(cfw.config.levels)
    schedule = noise_schedule(pipeline.scheduler.config.prediction_type)
    no_text = adapter.empty_prompt_embeds
    if no_text is None:
        no_text = embed_empty_prompt(pipeline.text_encoder, pipeline.tokenizer)
    no_text = no_text.detach().to(device)

    def predict(unet: nn.Module, adapter: nn.Module, x: Tensor, timestep: Tensor, lq_latent: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        with run.accelerator.autocast():
            sft = adapter(lq_latent, timestep)
            context = no_text.expand(len(x), -1, -1)
            return unet(x, timestep, context, timestep_cond=sft, return_dict=False)[0].float()

    # the teacher, and the network for the score of the student's latents: LoRA on one base, or whole copies
    teacher: tuple[Any, Any] = (unet, adapter)
    if config.distribution_weight or config.consistency_weight or config.lora_rank is not None:
        teacher = (branch(unet, config), copy.deepcopy(adapter))
    fake = (branch(unet, config), copy.deepcopy(adapter)) if config.distribution_weight else teacher

    # the student: train the chosen parts
    parts = []
    student: tuple[Any, Any] = (unet, adapter)
    if "unet" in config.trained_parts:
        is_lora = config.lora_rank is not None
        student = (run.train(make_trainable(unet, config), {"unet": ""}, only_trained=is_lora), adapter)
        parts.append("unet")
    if "adapter" in config.trained_parts:
        student = (student[0], run.train(adapter.requires_grad_(True).train(), {"adapter": ""}))
        parts.append("adapter")
    decode: nn.Module = StudentDecoding(vae, cfw)
    if "decoder" in config.trained_parts:
        for module in (vae.decoder, vae.post_quant_conv):
            if module is not None:
                module.requires_grad_(True)
    if "cfw" in config.trained_parts:
        cfw.requires_grad_(True)
    decoding = [part for part in ("decoder", "cfw") if part in config.trained_parts]
    if decoding:
        paths = [{"decoder": "vae", "cfw": "cfw"}[part] for part in decoding]
        decode = run.train(decode, {path: path for path in paths})
        parts += paths
    moves_latent = bool({"unet", "adapter"} & set(parts))
    if config.distribution_weight:
        constant: Any = {"learning_rate": config.fake_learning_rate, "is_clipped": False, "average": False}
        fake = (
            run.train(make_trainable(fake[0], config), {"fake_unet": ""}, only_trained=True, **constant),
            run.train(fake[1].requires_grad_(True).train(), {"fake_adapter": ""}, **constant),
        )

    # the losses on pictures
    pixel_loss, perceptual = PIXEL_LOSSES[config.pixel_loss], load_perceptual_loss(config)
    if perceptual is not None:
        perceptual.to(device)
    has_adversary = config.adversarial_weight > 0 or config.feature_matching_weight > 0
    adversary = Adversary(run, config) if has_adversary else None
    decodes = config.pixel_weight > 0 or max(config.flat_weights) > 0 or perceptual is not None or has_adversary

    def student_pipeline(networks: dict[str, Any]) -> StableSRPipeline:
        if config.lora_rank is not None and "unet" in networks:
            networks = networks | {"unet": merged(teacher[0], networks["unet"], config)}
        scheduler = build_small_scheduler(schedule.config.prediction_type)
        components = pipeline.components | networks | {"scheduler": scheduler}
        steps = config.student_steps[0]
        canvas = {name: pipeline.config[name] for name in ("min_size_px", "margin_px", "working_scale")}
        return StableSRPipeline(**components, default_steps=steps, **canvas)

    def restored(networks: dict[str, Any], example: Example) -> Tensor:
        made = student_pipeline(networks)
        made.set_progress_bar_config(disable=True)
        height, width = (None, None) if example.hq is None else example.hq.shape[-2:]
        generator = torch.Generator().manual_seed(config.seed)
        lq = image_to_pixels(example.lq)[0]
        return unit_to_image(made(lq, height=height, width=width, generator=generator, output_type="pt").images)

    run.validate(
        config, parts, restoration_examples(config), restored, Quality(config.niqe_statistics, config.metric_weights)
    )

    for draws, (lq, hq) in run.batches(data):
        # drawn once for all samples of a step
        chosen = stream(config.seed, run.step, purpose=Purpose.STEP)
        steps, w = int(chosen.choice(config.student_steps)), float(chosen.choice(config.w))
        is_velocity_step = config.velocity_every > 0 and run.step % config.velocity_every == 0
        is_student_step = run.step % config.student_every == 0

        # latents of both pictures, and features of the LQ picture for the fusion layers
        lq, hq = (image.contiguous(memory_format=torch.channels_last) for image in (lq, hq))
        with torch.no_grad(), run.accelerator.autocast():
            posterior, features = encode_with_features(vae, lq, levels)
            hq_latent = to_latent(vae.encode(hq).latent_dist.mean.float(), vae)
        mean, std = posterior.mean.float(), posterior.std.float()
        lq_latent = to_latent(mean + std * draws.normal(mean), vae).contiguous(memory_format=torch.channels_last)

        if is_velocity_step:
            # plain denoising of the HQ latent, so that the UNet remains a diffusion model
            task = denoising_task(hq_latent, draws, schedule, config)
            is_unconditional = run.step // config.velocity_every % 2 == 1
            sft = None if is_unconditional else student[1](lq_latent, task.timestep)
            context = no_text.expand(len(hq), -1, -1)
            loss = task.loss(student[0](task.x, task.timestep, context, timestep_cond=sft, return_dict=False)[0])
            run.backward(loss)
            run.update(**{"unconditional" if is_unconditional else "conditional": loss})
            continue

        # run the steps from the noised LQ latent; one of them, drawn at random, is trained
        trained = int(chosen.integers(steps))
        x0, noise = lq_latent, draws.normal(lq_latent)
        for i, t in enumerate(few_timesteps(steps)[: trained + 1]):
            timestep = torch.full((len(hq),), t, device=device)
            x = schedule.add_noise(x0, noise, timestep)
            with torch.set_grad_enabled(i == trained and moves_latent and is_student_step):
                x0, noise = take_apart(x, predict(*student, x, timestep, lq_latent), timestep, schedule)

        terms = {"latent": F.mse_loss(x0, hq_latent)}
        loss = config.latent_weight * terms["latent"]
        if decodes and is_student_step:
            # losses on the decoded picture
            with run.accelerator.autocast():
                z = from_latent(x0, vae).contiguous(memory_format=torch.channels_last)
                fake_image = decode(z, features, w).float()
            terms |= {"pixel": pixel_loss(fake_image, hq), "flat": flat_loss(fake_image, hq)}
            loss = loss + config.pixel_weight * terms["pixel"] + between(config.flat_weights, w) * terms["flat"]
            if max(config.lattice_weights) > 0:
                terms["lattice"] = lattice_loss(fake_image, hq)
                loss = loss + between(config.lattice_weights, w) * terms["lattice"]
            if perceptual is not None:
                terms["perceptual"] = perceptual(*shifted((fake_image, hq), draws, config.perceptual_shift_px))
                loss = loss + config.perceptual_factor * between(config.perceptual_fade, w) * terms["perceptual"]
            if adversary is not None:
                pictures = shifted((fake_image, hq), draws, config.adversarial_shift_px)
                adversarial, judged = adversary.judge(*pictures)
                loss, terms = loss + between(config.adversarial_fade, w) * adversarial, terms | judged
        if config.distribution_weight and is_student_step:
            # distribution matching: the score of the student's latents against the teacher's
            timestep = (20 + 960 * draws.uniform()).long().to(device)
            x = schedule.add_noise(x0.detach(), draws.normal(x0), timestep)
            with torch.no_grad():
                fake_x0, real_x0 = (
                    take_apart(x, predict(*networks, x, timestep, lq_latent), timestep, schedule).x0
                    for networks in (fake, teacher)
                )
            terms["distribution"] = distribution_matching_loss(x0, fake_x0, real_x0)
            loss = loss + config.distribution_weight * terms["distribution"]
        if config.consistency_weight:
            # consistency: two neighbouring points of the teacher's path give the same result
            way = consistency_task(hq_latent, draws, schedule, partial(predict, *teacher, lq_latent=lq_latent))
            with torch.no_grad():
                prediction = predict(*student, way.x_before, way.timestep_before, lq_latent)
                target = take_apart(way.x_before, prediction, way.timestep_before, schedule).x0
                target = torch.where(way.is_first, way.x_before, target)
            prediction = predict(*student, way.x, way.timestep, lq_latent)
            terms["consistency"] = F.mse_loss(take_apart(way.x, prediction, way.timestep, schedule).x0, target)
            loss = loss + config.consistency_weight * terms["consistency"]
        if is_student_step:
            run.backward(loss)
        terms = {f"{name}_w{w:g}": value for name, value in terms.items()}

        if config.distribution_weight:
            # train the network for the score of the student's latents
            task = denoising_task(x0.detach(), draws, schedule, config)
            terms["score"] = task.loss(predict(*fake, task.x, task.timestep, lq_latent))
            run.backward(terms["score"])
        run.update(**terms)

    if config.pairs is None:
        report_skipped(data.crops, run.accelerator)
    averages = {name: run.averaged(name) for name in parts}
    run.finish({"pipeline": student_pipeline(averages)} if run.is_main else {})


def open_data(config: FewStepConfig, run: TrainingRun) -> Any:
    """Pairs (lq, hq) of pictures, cached or degraded on the fly."""
    if config.pairs is not None:
        return CachedPairs(config.pairs, config.resolution, config.seed)
    return open_pairs(config, config.seed, run.share)


def branch(unet: UNet2DConditionModel, config: FewStepConfig) -> UNet2DConditionModel:
    """A copy to train separately. With LoRA both share the frozen weights in memory."""
    shared = {} if config.lora_rank is None else {id(weight): weight for weight in unet.parameters()}
    return copy.deepcopy(unet, shared)


def make_trainable(unet: UNet2DConditionModel, config: FewStepConfig) -> UNet2DConditionModel:
    """The UNet with gradients for all of its weights, or with LoRA. Raises ConfigError if peft is missing."""
    if config.lora_rank is None:
        return unet.requires_grad_(True).train()
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ConfigError("lora_rank needs peft; install it with `pip install 'stablesr-kit[lora]'`") from error
    rank = config.lora_rank
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=LORA_TARGETS))
    for weight in unet.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    return unet.train()


def merged(base: UNet2DConditionModel, lora: Weights, config: FewStepConfig) -> UNet2DConditionModel:
    """The base with LoRA weights of a trained branch added to its own, in float32."""
    unet = make_trainable(copy.deepcopy(base).float(), config)
    unet.load_state_dict(lora.state_dict(), strict=False)
    unet.fuse_lora()
    unet.unload_lora()
    return unet.requires_grad_(False).eval()


def between(weights: tuple[float, float], w: float) -> float:
    """The weight at w, interpolated from the weights at 0 and at 1."""
    return weights[0] + w * (weights[1] - weights[0])


if __name__ == "__main__":
    launch(main, FewStepConfig)
