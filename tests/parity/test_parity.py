"""The toolkit against reference outputs of the official modules: always a compact part, the whole where it is."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stablesr_kit import StableSRPipeline
from stablesr_kit.checkpoints import Hints
from stablesr_kit.checkpoints.key_maps import PREFIXES
from tests.parity import stablesr

HERE = Path(__file__).parents[1]
WHOLE = HERE.parents[1] / "shared" / "goldens"


def failures(folder: Path) -> list[str]:
    quantities = list(stablesr.check_folder(folder))
    assert quantities, f"nothing to check in {folder}"
    return [f"{name} {found} > {tolerance}" for name, found, tolerance in quantities if found > tolerance]


def test_compact_stablesr_references_are_reproduced() -> None:
    assert not failures(HERE / "goldens" / "stablesr")


@pytest.fixture
def whole() -> Path:
    folder = WHOLE / "stablesr" / "open"
    if not folder.is_dir():
        pytest.skip("the whole references are not beside the checkout")
    return folder


def test_all_stablesr_references_are_reproduced(whole: Path) -> None:
    assert not failures(whole)


def test_a_converted_checkpoint_restores_the_reference_picture(whole: Path, tmp_path: Path) -> None:
    """Released layout -> from_original -> save -> load -> the sampling loop and the decoding with CFW."""
    unet, encoder, cfw = (load_file(whole / f"weights_{name}.safetensors") for name in ("unet", "structcond", "cfw"))
    state = {PREFIXES["unet"] + name: tensor for name, tensor in unet.items()}
    state |= {PREFIXES["encoder"] + name: tensor for name, tensor in encoder.items()}
    state |= {PREFIXES["vae"] + name: tensor for name, tensor in cfw.items() if "fusion_layer" not in name}
    torch.save({"state_dict": state}, tmp_path / "stablesr.ckpt")
    torch.save({"state_dict": cfw}, tmp_path / "vqgan_cfw.ckpt")
    config = json.loads((whole / "config.json").read_text())
    pipeline = StableSRPipeline.from_original(
        tmp_path / "stablesr.ckpt",
        cfw=tmp_path / "vqgan_cfw.ckpt",
        prediction_type={"eps": "epsilon", "v": "v_prediction"}[config["parameterization"]],
        hints=Hints(unet_head_channels=config["unet"]["num_head_channels"], encoder_heads=config["enc"]["num_heads"]),
    )
    pipeline.save_pretrained(tmp_path / "converted")
    loaded = StableSRPipeline.from_pretrained(tmp_path / "converted")
    official = stablesr.Official(whole, loaded)
    with torch.no_grad():
        quantities = list(stablesr.check_sample_ddpm(official, "sample_ddpm"))
    assert {"sample_ddpm.out", "sample_ddpm.out_decoded_w0.5"} <= {name for name, _, _ in quantities}
    assert not [f"{name} {found} > {tolerance}" for name, found, tolerance in quantities if found > tolerance]


def test_a_file_that_is_not_understood_fails(tmp_path: Path) -> None:
    for path in (HERE / "goldens" / "stablesr").iterdir():
        if path.name in stablesr.NOT_QUANTITIES:
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "surprise.safetensors").write_bytes(b"")
    assert failures(tmp_path) == ["surprise (not understood) inf > 0.0"]
