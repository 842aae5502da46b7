"""The text that a one-step restorer was made with, as its embedding."""

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin


class DefaultPrompt(ModelMixin, ConfigMixin):
    """What the UNet attends to where no text is given, so that no text encoder is needed for it.

    Its buffer `embeds` is (1, length, channels).

    Args:
        text: that was embedded.
        length, channels: of the embedding.
    """

    @register_to_config
    def __init__(self, text: str = "", length: int = 77, channels: int = 1024) -> None:  # noqa: ARG002, in the config
        super().__init__()
        self.embeds = torch.nn.Buffer(torch.zeros(1, length, channels))
