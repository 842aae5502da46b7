"""Autoencoders as training loops call them: one forward pass through all that is trained.

Only what goes through the forward of the prepared network is reduced over processes and gathered where parameters
are spread, so a loop must not call a submodule past it.
"""

from diffusers import AutoencoderKL
from torch import Tensor, nn

from stablesr_kit.models.feature_wrapping import ControllableFeatureWrapping, decode_with_features


class Reconstruction(nn.Module):
    """An autoencoder, there and back through a sampled latent."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, image: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstruction (B, 3, H, W), and the posterior's divergence from a unit normal, a mean over latent elements.

        image: (B, 3, H, W) in [-1, 1]; noise: standard normal, (B, C, h, w).
        """
        posterior = self.vae.encode(image).latent_dist
        reconstruction = self.vae.decode(posterior.mean + posterior.std * noise).sample
        return reconstruction, posterior.kl().mean() / posterior.mean[0].numel()


class Decoding(nn.Module):
    """An autoencoder whose decoder is trained."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, z: Tensor) -> Tensor:
        """Image (B, 3, H, W) of the raw code z (B, C, h, w)."""
        return self.vae.decode(z).sample


class FusedDecoding(nn.Module):
    """A frozen autoencoder's decoder with fusion layers that are trained."""

    def __init__(self, vae: AutoencoderKL, cfw: ControllableFeatureWrapping) -> None:
        super().__init__()
        self.vae = vae
        self.cfw = cfw

    def forward(self, z: Tensor, features: dict[int, Tensor], w: float) -> Tensor:
        """Image (B, 3, H, W) of the raw code z with features wrapped in; arguments as `decode_with_features`."""
        return decode_with_features(self.vae, self.cfw, z, features, w)


def latent_shape(vae: AutoencoderKL, image: Tensor) -> tuple[int, int, int, int]:
    """(B, C, h, w) of the latent of an image batch (B, 3, H, W)."""
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    batch, _, height, width = image.shape
    return batch, vae.config.latent_channels, height // factor, width // factor
