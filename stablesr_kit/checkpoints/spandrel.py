"""Networks of other projects, in any architecture that spandrel knows: ESRGAN, SwinIR, DAT, HAT, Restormer and more."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from stablesr_kit.checkpoints.reading import read_checkpoint
from stablesr_kit.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from spandrel import ImageModelDescriptor


def load_spandrel(path: Path, device: torch.device | str = "cpu") -> "ImageModelDescriptor[torch.nn.Module]":
    """The network of a file, from RGB to RGB; its call pads and clamps, (B, 3, h, w) in [0, 1] on both sides.

    If spandrel_extra_arches is installed, its architectures work too; some of them forbid commercial use.

    Raises:
        ConfigError: the extra is not installed.
        CheckpointError: the file holds no such network, or one that does not turn RGB into RGB.
    """
    try:
        from spandrel import MAIN_REGISTRY, ArchRegistry, ImageModelDescriptor, ModelLoader, UnsupportedModelError
    except ImportError as error:
        raise ConfigError(
            f"{path}: networks of other projects need an extra; pip install 'stablesr-kit[spandrel]'"
        ) from error
    registry = ArchRegistry()
    registry.add(*MAIN_REGISTRY)
    try:
        from spandrel_extra_arches import EXTRA_REGISTRY
    except ImportError:
        pass
    else:
        registry.add(*EXTRA_REGISTRY)
    weights = read_checkpoint(path).content
    try:
        model = ModelLoader(device=torch.device(device), registry=registry).load_from_state_dict(dict(weights))
    except (UnsupportedModelError, RuntimeError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: no super-resolution network that spandrel knows ({reason})") from error
    if not isinstance(model, ImageModelDescriptor) or (model.input_channels, model.output_channels) != (3, 3):
        raise CheckpointError(f"{path}: a network of {model.architecture.name} that does not turn RGB into RGB")
    return model.eval()
