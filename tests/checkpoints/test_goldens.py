"""Weights of the official modules: configs read from shapes, and the way through the released files' layout.

What the converted networks compute is compared by `tests/parity.py`, from the same weights.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from stablesr_kit.checkpoints import Hints, convert_checkpoint, load_official
from stablesr_kit.checkpoints.key_maps import PREFIXES

FOLDER = Path(__file__).parents[1] / "goldens" / "stablesr"


@pytest.fixture(scope="module")
def weights() -> dict[str, dict[str, Tensor]]:
    """State dicts of the official modules. Those tensors that no reference here depends on are zero."""
    shapes = json.loads((FOLDER / "shapes.json").read_text())
    return {
        part: {name: torch.zeros(shape) for name, shape in shapes.get(part, {}).items()}
        | load_file(FOLDER / f"weights_{part}.safetensors")
        for part in ("unet", "structcond", "cfw")
    }


@pytest.fixture(scope="module")
def config() -> Any:
    return json.loads((FOLDER / "config.json").read_text())


@pytest.fixture(scope="module")
def components(config: Any, weights: dict[str, dict[str, Tensor]]) -> dict[str, Any]:
    return load_official(config, unet=weights["unet"], encoder=weights["structcond"], cfw=weights["cfw"])


def test_the_configs_read_from_shapes_are_those_the_modules_were_made_with(
    components: dict[str, Any], config: Any
) -> None:
    official, unet = config["unet"], components["unet"].config
    widths = tuple(official["model_channels"] * factor for factor in official["channel_mult"])
    assert unet.block_out_channels == widths
    assert unet.layers_per_block == official["num_res_blocks"]
    assert unet.cross_attention_dim == official["context_dim"]
    assert unet.attention_head_dim == [width // official["num_head_channels"] for width in widths]
    with_attention = [2**level in official["attention_resolutions"] for level in range(len(widths))]
    assert ["CrossAttn" in block for block in unet.down_block_types] == with_attention

    official, adapter = config["enc"], components["adapter"].config
    assert adapter.block_out_channels == tuple(
        official["model_channels"] * factor for factor in official["channel_mult"]
    )
    assert adapter.layers_per_block == official["num_res_blocks"]
    assert adapter.num_attention_heads == official["num_heads"]
    assert adapter.cond_channels == official["out_channels"] == config["unet"]["semb_channels"]

    official, vae = config["dd"], components["vae"].config
    assert vae.block_out_channels == tuple(official["ch"] * factor for factor in official["ch_mult"])
    assert vae.layers_per_block == official["num_res_blocks"]
    expected = {"eps": "epsilon", "v": "v_prediction"}[config["parameterization"]]
    assert components["scheduler"].config.prediction_type == expected


def test_the_same_weights_in_the_released_files_give_the_same_networks(
    tmp_path: Path, components: dict[str, Any], config: Any, weights: dict[str, dict[str, Tensor]]
) -> None:
    state = {PREFIXES["unet"] + name: tensor for name, tensor in weights["unet"].items()}
    state |= {PREFIXES["encoder"] + name: tensor for name, tensor in weights["structcond"].items()}
    plain = {name: tensor for name, tensor in weights["cfw"].items() if "fusion_layer" not in name}
    state |= {PREFIXES["vae"] + name: tensor for name, tensor in plain.items()}
    torch.save({"state_dict": state, "global_step": 16500}, tmp_path / "stablesr_000117.ckpt")
    torch.save({"state_dict": weights["cfw"]}, tmp_path / "vqgan_cfw_00011.ckpt")
    converted = convert_checkpoint(
        tmp_path / "stablesr_000117.ckpt",
        cfw=tmp_path / "vqgan_cfw_00011.ckpt",
        prediction_type=components["scheduler"].config.prediction_type,
        hints=Hints(unet_head_channels=config["unet"]["num_head_channels"], encoder_heads=config["enc"]["num_heads"]),
    )
    for part in ("unet", "vae", "adapter", "cfw"):
        ours, theirs = converted[part].state_dict(), components[part].state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), part
