"""VGG-16 without its trained weights, for tests of what is built on it."""

from pathlib import Path

import torch
import torchvision
from safetensors.torch import save_file
from torch import nn


def random_vgg16() -> nn.Sequential:
    """VGG-16's convolutions with random weights of a useful size."""
    with torch.device("meta"):
        features = torchvision.models.vgg16().features
    features.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in features.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 10000
        parameter.data = torch.randn(parameter.shape, generator=generator) * (2 / fan_in) ** 0.5
    return features.requires_grad_(False).eval()


def save_vgg16(features: nn.Sequential, folder: Path) -> Path:
    """A file as torchvision saves it, with a part of the classifier."""
    state = {f"features.{name}": tensor for name, tensor in features.state_dict().items()}
    save_file(state | {"classifier.0.bias": torch.zeros(4096)}, folder / "vgg16.safetensors")
    return folder / "vgg16.safetensors"
