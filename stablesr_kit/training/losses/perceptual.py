"""Perceptual losses: distances of two pictures in the features of a classifier; never with random weights."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stablesr_kit.checkpoints.reading import read_checkpoint
from stablesr_kit.errors import CheckpointError, ConfigError
from stablesr_kit.spaces import image_to_unit
from stablesr_kit.training.data.batches import SampleDraws

logger = logging.getLogger(__name__)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_DEVIATION = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class PerceptualOptions:
    """The perceptual loss."""

    perceptual: Literal["none", "vgg", "lpips"] = "none"
    """The perceptual loss: vgg (feature reconstruction, Johnson et al. 2016), lpips (Zhang et al. 2018) or none."""
    perceptual_weights: str | None = None
    """File of VGG-16's ImageNet weights as torchvision saves them; None takes torchvision's cache, or fetches it."""
    perceptual_factor: float = 1.0
    """Weight of the perceptual loss; the pixel loss has weight 1."""


def load_perceptual_loss(options: PerceptualOptions) -> "FeatureReconstruction | LPIPS | None":
    """The frozen network of the options, whose call (image, target) gives a scalar; None for "none". It is logged.

    Raises ConfigError if torchvision or lpips is missing, CheckpointError if the real weights are not available.
    """
    if options.perceptual == "none":
        logger.info("trains without a perceptual loss (perceptual: none)")
        return None
    weights = read_vgg16(options.perceptual_weights)
    loss = LPIPS(weights.state) if options.perceptual == "lpips" else FeatureReconstruction(weights.state)
    logger.info("perceptual loss %s on the VGG-16 of %s", options.perceptual, weights.origin)
    return loss


class VGG16Weights(NamedTuple):
    """Weights of the convolutions, named as in torchvision without `features.`, and their origin."""

    state: dict[str, Tensor]
    origin: str


def read_vgg16(file: str | Path | None) -> VGG16Weights:
    """ImageNet weights of VGG-16's convolutions from a file, or, for None, from torchvision's cache or its server.

    Raises CheckpointError if they are not available, ConfigError if torchvision is missing.
    """
    if file is not None:
        content, origin = read_checkpoint(file).content, str(file)
    else:
        weights = _torchvision().models.VGG16_Weights.IMAGENET1K_V1
        origin = str(Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name)
        try:
            content = weights.get_state_dict(progress=False, check_hash=True)
        except (OSError, RuntimeError) as error:  # no connection, full disk, or a wrong hash
            raise CheckpointError(
                f"VGG-16's weights are not at {origin} and cannot be fetched ({error}); "
                "put them there, give perceptual_weights, or train without: perceptual none"
            ) from error
    state = {name.removeprefix("features."): value for name, value in content.items() if name.startswith("features.")}
    expected = {name: tuple(value.shape) for name, value in _vgg16_features().state_dict().items()}
    found = {name: tuple(value.shape) for name, value in state.items() if isinstance(value, Tensor)}
    if found != expected:
        differing = sorted(name for name in expected | found if expected.get(name) != found.get(name))
        raise CheckpointError(
            f"{origin} is no VGG-16 of torchvision: features.{differing[0]} is {found.get(differing[0], 'missing')}, "
            f"expected {expected.get(differing[0], 'none')}; give the file of torchvision.models.vgg16"
        )
    return VGG16Weights({name: value for name, value in state.items() if isinstance(value, Tensor)}, origin)


class FeatureReconstruction(nn.Module):
    """Feature reconstruction loss: ``|phi_j(image) - phi_j(target)|^2 / (C_j H_j W_j)`` (Johnson et al. 2016, eq. 2).

    phi_j is the output of the named ReLU of VGG-16; with several, the loss is their sum; over a batch, the mean.
    state: weights of `read_vgg16`. layers: numbers in torchvision's `features`; 8 is relu2_2, the paper's choice for
    super-resolution.
    """

    def __init__(self, state: dict[str, Tensor], layers: tuple[int, ...] = (8,)) -> None:
        super().__init__()
        self.features = _vgg16_features()[: max(layers) + 1]
        own = {name: state[name].float() for name in self.features.state_dict()}
        self.features.load_state_dict(own, assign=True)
        self.layers = layers
        self.requires_grad_(False).eval()

    def forward(self, image: Tensor, target: Tensor) -> Tensor:
        """The loss of pictures (B, 3, H, W) in [-1, 1], of at least 8 px per side; no gradient reaches the target."""
        with torch.no_grad():
            expected = self.describe(target)
        terms = [F.mse_loss(ours, theirs) for ours, theirs in zip(self.describe(image), expected, strict=True)]
        return torch.stack(terms).sum()

    def describe(self, image: Tensor) -> list[Tensor]:
        """phi_j of pictures in [-1, 1], one (B, C_j, H_j, W_j) per layer."""
        x = imagenet_normalised(image)
        described = []
        for number, layer in enumerate(self.features):
            x = F.relu(x) if isinstance(layer, nn.ReLU) else layer(x)  # not in place: the input may be kept
            if number in self.layers:
                described.append(x)
        return described


class LPIPS(nn.Module):
    """Learned perceptual distance on VGG-16 (Zhang et al. 2018, version 0.1), by the lpips package and its heads.

    state: weights of `read_vgg16`. official_quirks: pictures are normalised for ImageNet before lpips does so itself,
    as CodeFormer was trained.
    """

    def __init__(self, state: dict[str, Tensor], *, official_quirks: bool = False) -> None:
        super().__init__()
        try:
            import lpips
        except ImportError as error:
            raise ConfigError("LPIPS needs lpips; install it with `pip install 'stablesr-kit[train]'`") from error
        self.network = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)  # real heads; the trunk follows
        trunk = {name: name.split(".", 1)[1] for name in self.network.net.state_dict()}  # slice1.0.weight: 0.weight
        self.network.net.load_state_dict({name: state[ours] for name, ours in trunk.items()})
        self.official_quirks = official_quirks
        self.requires_grad_(False).eval()

    def forward(self, image: Tensor, target: Tensor) -> Tensor:
        """Mean distance of pictures (B, 3, H, W) in [-1, 1], of at least 16 px per side."""
        if self.official_quirks:
            image, target = imagenet_normalised(image), imagenet_normalised(target)
        return self.network(image, target).mean()


def shifted(pictures: Sequence[Tensor], draws: SampleDraws, most_px: int) -> list[Tensor]:
    """The same crop of every picture (B, 3, H, W), smaller by most_px, shifted and flipped at random.

    A network that halves its input several times responds to small periodic patterns differently at each shift. With
    random shifts it sees them at every phase.
    """
    tops, lefts = ((draws.uniform() * (most_px + 1)).int().tolist() for _ in range(2))
    flips = [
        [axis for axis, is_flipped in zip((-2, -1), pair, strict=True) if is_flipped]
        for pair in zip(*((draws.uniform() < 0.5).tolist() for _ in range(2)), strict=True)
    ]

    def part(image: Tensor, top: int, left: int, axes: list[int]) -> Tensor:
        height, width = (side - most_px for side in image.shape[-2:])
        return image[..., top : top + height, left : left + width].flip(axes)

    return [
        torch.stack([part(*place) for place in zip(images, tops, lefts, flips, strict=True)]).contiguous(
            memory_format=torch.channels_last
        )
        for images in pictures
    ]


def imagenet_normalised(image: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1], normalised for ImageNet classifiers."""
    mean, deviation = (image.new_tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_DEVIATION))
    return (image_to_unit(image) - mean) / deviation


def _vgg16_features() -> nn.Sequential:
    """VGG-16's convolutions without storage for their weights."""
    with torch.device("meta"):
        features: nn.Sequential = _torchvision().models.vgg16().features
    return features


def _torchvision():  # type: ignore[no-untyped-def]
    try:
        import torchvision
    except ImportError as error:
        raise ConfigError(
            "a perceptual loss needs torchvision; install it with `pip install 'stablesr-kit[train]'`"
        ) from error
    return torchvision
