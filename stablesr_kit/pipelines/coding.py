"""Pictures to latents and back: sizes, autoencoder, CFW."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import DiffusionPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from stablesr_kit.imaging.padding import pad_to
from stablesr_kit.imaging.resizing import resize_bicubic
from stablesr_kit.models.feature_wrapping import decode_with_features, encode_with_features
from stablesr_kit.spaces import from_latent, to_latent

Generators = torch.Generator | list[torch.Generator] | None


class ImageCoding(DiffusionPipeline):
    """The steps of a call that size, encode and decode pictures."""

    def upsample(
        self, image: Tensor, scale: float | None = None, height: int | None = None, width: int | None = None
    ) -> Tensor:
        """The image resized bicubically to the result's size: scale times its own (default 4), or height x width."""
        if height is None or width is None:
            scale = 4.0 if scale is None else scale
            height, width = (max(round(side * scale), 1) for side in image.shape[-2:])
        return resize_bicubic(image, height, width)

    def pad(self, image: Tensor) -> Tensor:
        """The image continued by reflection to a size that every level of the networks divides evenly.

        At least two positions per side are left at the deepest level: group norms have nothing to measure on one.
        """
        multiple = self.vae_scale_factor * 2 ** (len(self.unet.config.block_out_channels) - 1)
        smallest = max(self.config.min_size_px, 2 * multiple)
        return pad_to(image, *(math.ceil(max(side, smallest) / multiple) * multiple for side in image.shape[-2:]))

    def encode_image(
        self,
        image: Tensor,
        generator: Generators = None,
        with_features: bool = True,
        num_images_per_prompt: int = 1,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """LQ latents (B * num_images_per_prompt, C, h, w), samples of the posterior, and the features CFW needs.

        image: (B, 3, H, W) in [-1, 1], H and W as `pad` makes them. The features, level -> (B, C, h, w), are the
        encoder's; none without cfw or on request.
        """
        levels = tuple(self.cfw.config.levels) if with_features and self.cfw is not None else ()
        with self._vae_in_safe_precision():
            image = image.to(self._execution_device, self.vae.dtype)
            posterior, features = encode_with_features(self.vae, image, levels)
            moments = posterior.parameters.repeat_interleave(num_images_per_prompt, dim=0)
            z = DiagonalGaussianDistribution(moments).sample(generator)
        return to_latent(z, self.vae).to(self.unet.dtype), features

    def decode_latents(self, latents: Tensor, features: dict[int, Tensor], w: float) -> Tensor:
        """Image (B, 3, H, W), about [-1, 1], of latents (B, C, h, w); `features` of `encode_image` unless w is 0.

        Raises:
            FloatingPointError: the UNet or the decoder overflowed.
        """
        with self._vae_in_safe_precision():
            z = from_latent(latents.to(self._execution_device, self.vae.dtype), self.vae)
            if w == 0 or self.cfw is None:
                image = self.vae.decode(z, return_dict=False)[0]
            else:
                copies = len(z) // len(next(iter(features.values())))
                features = {k: v.repeat_interleave(copies, dim=0) for k, v in features.items()}
                image = decode_with_features(self.vae, self.cfw, z, features, w)
        if not torch.isfinite(image).all():
            raise FloatingPointError(
                f"the restored picture is not finite, computed in {self.unet.dtype} and decoded in {self.vae.dtype}; "
                "load the pipeline in bfloat16 or float32"
            )
        return image.float()

    @contextmanager
    def _vae_in_safe_precision(self) -> Iterator[None]:
        """The autoencoder and CFW in float32 while they run, if half precision would overflow them."""
        upcast = self.vae.dtype == torch.float16 and self.vae.config.force_upcast
        dtypes = [(part, part.dtype) for part in (self.vae, self.cfw) if upcast and part is not None]
        for part, _ in dtypes:
            part.to(torch.float32)
        try:
            yield
        finally:
            for part, dtype in dtypes:
                part.to(dtype)
