"""Train controllable feature wrapping on a pipeline's own samples, the autoencoder frozen (Wang et al. 2023, stage 2).

accelerate launch training/train_cfw.py --config configs/mini/cfw.yaml
"""

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from stablesr_kit.errors import ConfigError
from stablesr_kit.evaluation.quality import Quality
from stablesr_kit.models.feature_wrapping import (
    ControllableFeatureWrapping,
    decode_with_features,
    encode_with_features,
)
from stablesr_kit.spaces import from_latent
from stablesr_kit.training.data.computed import RestoredCrops
from stablesr_kit.training.losses.adversarial import AdversarialOptions, Adversary
from stablesr_kit.training.losses.pictures import PictureLoss, PictureLossOptions, PixelLoss
from stablesr_kit.training.run.command_line import launch
from stablesr_kit.training.run.config import RunConfig
from stablesr_kit.training.run.networks import InterpolationOptions, interpolate, load_network
from stablesr_kit.training.run.run import TrainingRun
from stablesr_kit.training.run.validation import Example, ValidationOptions, sample_examples
from stablesr_kit.training.small import start_fusion_silent


@dataclass(frozen=True, kw_only=True)
class CFWConfig(AdversarialOptions, InterpolationOptions, PictureLossOptions, ValidationOptions, RunConfig):
    """Options of this program."""

    samples: str
    """File written by generate_cfw_data.py."""
    validation_samples: str | None = None
    """The same of photographs that are not trained on, for validation; they are decoded with w = 1."""
    resolution: int = 64
    """Side of the square crops in px."""
    pretrained_vae: str
    """Folder of the autoencoder."""
    pretrained_cfw: str | None = None
    """Folder of fusion layers to start from; None builds untrained ones."""
    num_rrdb: int = 1
    """RRDBs per untrained fusion layer."""
    growth_channels: int = 16
    """Growth of the dense blocks of untrained fusion layers."""
    pixel_loss: PixelLoss = "reconstruction"
    """Loss between pictures; reconstruction also compares gradients, colours and mean brightness. StableSR: l1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.trained_share < 1 and self.pretrained_cfw is None:
            raise ConfigError(f"trained_share={self.trained_share} needs pretrained_cfw, which the rest is taken from")


class FusedDecoding(nn.Module):
    """A frozen autoencoder's decoder with fusion layers that are trained."""

    def __init__(self, vae: AutoencoderKL, cfw: ControllableFeatureWrapping) -> None:
        super().__init__()
        self.vae = vae
        self.cfw = cfw

    def forward(self, z: Tensor, features: dict[int, Tensor], w: float) -> Tensor:
        """Image (B, 3, H, W) of the raw code z with features wrapped in; arguments as `decode_with_features`."""
        return decode_with_features(self.vae, self.cfw, z, features, w)


def main(config: CFWConfig) -> None:
    """Train, write checkpoints, and save the averaged fusion layers to output_dir/cfw."""
    run = TrainingRun(config)
    crops = RestoredCrops(config.samples, config.resolution, config.seed)

    # only the fusion layers are trained
    vae = load_network(AutoencoderKL, config.pretrained_vae, "pretrained_vae").to(memory_format=torch.channels_last)
    vae.requires_grad_(False).eval()
    if config.pretrained_cfw is None:
        cfw = ControllableFeatureWrapping.from_vae(
            vae, num_rrdb=config.num_rrdb, growth_channels=config.growth_channels
        )
        start_fusion_silent(cfw)
    else:
        cfw = load_network(ControllableFeatureWrapping, config.pretrained_cfw, "pretrained_cfw")
    if config.gradient_checkpointing:
        cfw.enable_gradient_checkpointing()
    levels = tuple(cfw.config.levels)
    decode = run.train(FusedDecoding(vae, cfw.to(memory_format=torch.channels_last).train()), {"cfw": "cfw"})
    picture_loss = PictureLoss(config, run.accelerator.device)
    has_adversary = config.adversarial_weight > 0 or config.feature_matching_weight > 0
    adversary = Adversary(run, config) if has_adversary else None

    def restored(cfw: ControllableFeatureWrapping, example: Example) -> Tensor:
        assert example.latent is not None  # the examples are samples
        _, features = encode_with_features(vae, example.lq, levels)
        return decode_with_features(vae, cfw, from_latent(example.latent, vae), features, 1.0)

    examples = sample_examples(config, config.validation_samples)
    run.validate(config, "cfw", examples, restored, Quality(config.niqe_statistics, config.metric_weights))

    for _, (lq, latent, hq) in run.batches(crops):
        lq, hq = lq.to(memory_format=torch.channels_last), hq.to(memory_format=torch.channels_last)

        # decode the sample with features of the LQ picture, w = 1
        with torch.no_grad(), run.accelerator.autocast():
            _, features = encode_with_features(vae, lq, levels)
        z = from_latent(latent, vae).to(memory_format=torch.channels_last)
        fake = decode(z, features, 1.0).float()

        loss, terms = picture_loss(fake, hq)
        if adversary is not None:
            adversarial, judged = adversary.judge(fake, hq)
            loss, terms = loss + adversarial, terms | judged
        run.backward(loss)
        run.update(**terms)

    cfw = run.averaged("cfw")
    if run.is_main and config.pretrained_cfw is not None:
        interpolate(cfw, load_network(ControllableFeatureWrapping, config.pretrained_cfw, "pretrained_cfw"), config)
    run.finish({"cfw": cfw})


if __name__ == "__main__":
    launch(main, CFWConfig)
