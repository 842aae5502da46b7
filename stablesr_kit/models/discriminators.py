"""Discriminators of adversarial training."""

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm


class PatchDiscriminator(nn.Module):
    """Judges overlapping patches (Isola et al. 2017), its layers normalised spectrally (Miyato et al. 2018).

    Args:
        in_channels: channels of the picture.
        base_channels: width of the first layer; doubled with every halving of the picture.
        num_halvings: layers of stride 2.
    """

    def __init__(self, in_channels: int = 3, base_channels: int = 32, num_halvings: int = 2) -> None:
        super().__init__()
        widths = [base_channels * 2**i for i in range(num_halvings + 1)]
        self.layers = nn.ModuleList(
            spectral_norm(nn.Conv2d(before, width, 4, stride=2, padding=1))
            for before, width in zip([in_channels, *widths], widths[:-1], strict=False)
        )
        self.layers.append(spectral_norm(nn.Conv2d(widths[-2], widths[-1], 3, padding=1)))
        self.to_logits = nn.Conv2d(widths[-1], 1, 3, padding=1)

    def forward(self, image: Tensor, update_norms: bool = False) -> tuple[Tensor, list[Tensor]]:
        """Logits (B, 1, h, w), positive for what looks real, and the features of every layer; image (B, C, H, W).

        update_norms: move the spectral norms by one power iteration first, in eval mode too.
        """
        if update_norms:
            self._update_norms()
        features = []
        h = image
        for layer in self.layers:
            h = F.leaky_relu(layer(h), 0.2)
            features.append(h)
        return self.to_logits(h), features

    @torch.no_grad()
    def _update_norms(self) -> None:
        was_training = self.training
        self.train()
        for layer in self.layers:
            _ = layer.weight  # computing it is what moves the norm
        self.train(was_training)


class VQGANDiscriminator(ModelMixin, ConfigMixin):
    """Judges overlapping patches (Isola et al. 2017, 70 px at the default size), with batch normalisation.

    Args:
        in_channels: channels of the picture.
        base_channels: width of the first layer; doubled layer by layer, up to eight times.
        num_layers: how often the picture is halved; one layer of stride 1 and the logits follow.
    """

    @register_to_config
    def __init__(self, in_channels: int = 3, base_channels: int = 64, num_layers: int = 4) -> None:
        super().__init__()
        widths = [base_channels * min(2**i, 8) for i in range(num_layers + 1)]
        layers: list[nn.Module] = [
            nn.Conv2d(in_channels, widths[0], 4, stride=2, padding=1),
            nn.LeakyReLU(0.2, inplace=True),
        ]
        for i in range(num_layers):
            stride = 2 if i < num_layers - 1 else 1
            layers += [
                nn.Conv2d(widths[i], widths[i + 1], 4, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(widths[i + 1]),
                nn.LeakyReLU(0.2, inplace=True),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, padding=1))

    def forward(self, image: Tensor) -> Tensor:
        """Logits (B, 1, h, w), positive for what looks real; image (B, 3, H, W)."""
        return self.layers(image)
