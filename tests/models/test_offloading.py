"""Networks that share a folder on disk keep their own weights."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from stablesr_kit.models.execution import offload_groups_to_disk
from stablesr_kit.models.steering import steered_prediction
from tests.helpers.tiny import TEXT_CHANNELS, tiny_adapter, tiny_text_encoder, tiny_tokenizer, tiny_unet, unit_noise


@pytest.mark.parametrize("options", [{"offload_type": "leaf_level"}, {"num_blocks_per_group": 1}], ids=str)
@torch.no_grad()
def test_networks_with_layers_of_equal_names_and_any_layout_share_a_folder(
    options: dict[str, Any], tmp_path: Path
) -> None:
    latents, text = unit_noise(1, 4, 8, 8), unit_noise(1, 5, TEXT_CHANNELS)
    tokens = tiny_tokenizer()("cat", return_tensors="pt").input_ids

    def networks() -> dict[str, torch.nn.Module]:
        unet = tiny_unet()
        found = {"unet": unet, "adapter": tiny_adapter(unet), "text_encoder": tiny_text_encoder(tiny_tokenizer())}
        return {name: network.to(memory_format=torch.channels_last) for name, network in found.items()}

    def outputs(parts: dict[str, torch.nn.Module]) -> tuple[torch.Tensor, torch.Tensor]:
        prediction = steered_prediction(parts["unet"], parts["adapter"], latents, 500, latents, text)
        return prediction, parts["text_encoder"](tokens)[0]

    expected = outputs(networks())
    for scale in (0.5, 1.0):  # the second run finds the files of the first
        offloaded = networks()
        for parameter in offloaded["unet"].parameters():
            parameter.mul_(scale)
        offload_groups_to_disk(offloaded, tmp_path, onload_device=torch.device("cpu"), **options)
        found = outputs(offloaded)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    assert len(list(tmp_path.iterdir())) >= 3
    del offloaded
    gc.collect()
    assert not list(tmp_path.iterdir())
