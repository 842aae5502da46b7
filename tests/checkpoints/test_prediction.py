"""What a UNet predicts: by name, by config, or by what it does with noise."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from stablesr_kit.checkpoints import Hints, convert_checkpoint
from stablesr_kit.checkpoints.base import measure_prediction
from stablesr_kit.checkpoints.detecting import prediction_from_name
from stablesr_kit.diffusion.spaced import SpacedDDPMScheduler
from stablesr_kit.errors import CheckpointError
from stablesr_kit.pipelines.loading import EMBEDDED, resolve_model
from tests.helpers import official_layout as official

HINTS = Hints(unet_head_channels=8)


class IdealUNet(nn.Module):
    """The best possible predictor for Gaussian latents whose power falls with the square of the frequency, as in
    photographs: a Wiener filter."""

    config = SimpleNamespace(in_channels=4, cross_attention_dim=8)
    dtype = torch.float32

    def __init__(self, prediction_type: str) -> None:
        super().__init__()
        self.prediction_type = prediction_type
        self.alphas_cumprod = SpacedDDPMScheduler().alphas_cumprod

    def forward(self, x: Tensor, timestep: int, _context: Tensor) -> Any:
        a = self.alphas_cumprod[timestep]
        frequency = torch.fft.fftfreq(x.shape[-1]).square()[None] + torch.fft.fftfreq(x.shape[-2]).square()[:, None]
        power = 1 / (frequency + 1e-3)
        power = power / power.mean()
        x0 = torch.fft.ifft2(torch.fft.fft2(x) * a.sqrt() * power / (a * power + 1 - a)).real
        eps = (x - a.sqrt() * x0) / (1 - a).sqrt()
        v = a.sqrt() * eps - (1 - a).sqrt() * x0
        return SimpleNamespace(sample=eps if self.prediction_type == "epsilon" else v)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_trained_unet_tells_what_it_predicts(prediction_type: str) -> None:
    measured = measure_prediction(IdealUNet(prediction_type))
    assert measured is not None and measured.type == prediction_type and measured.is_certain


def test_an_untrained_unet_tells_nothing() -> None:
    assert measure_prediction(official.tiny_networks()["unet"]) is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("stablesr_000117.ckpt", "epsilon"),
        ("stablesr_turbo.ckpt", "epsilon"),
        ("stablesr_768v_000139.ckpt", "v_prediction"),
        ("webui_768v_139.ckpt", "v_prediction"),
        ("stablesr_webui_sd-v2-1-512-ema-000117.ckpt", "epsilon"),
        ("v2-1_768-ema-pruned.safetensors", "v_prediction"),
        ("v2-1_512-ema-pruned.ckpt", "epsilon"),
        ("face_stablesr_000050.ckpt", None),
        ("my_model.ckpt", None),
    ],
)
def test_published_names_are_known(name: str, expected: str | None) -> None:
    found = prediction_from_name(name)
    assert (found and found.type) == expected


def saved(folder: Path, name: str) -> Path:
    torch.save({"state_dict": official.official_checkpoint(official.tiny_networks())}, folder / name)
    return folder / name


def test_what_is_given_counts_before_what_the_name_says(tmp_path: Path) -> None:
    full = saved(tmp_path, "stablesr_768v_000139.ckpt")
    assert convert_checkpoint(full, hints=HINTS)["scheduler"].config.prediction_type == "v_prediction"
    given = convert_checkpoint(full, hints=HINTS, prediction_type="epsilon")
    assert given["scheduler"].config.prediction_type == "epsilon"


def test_the_768v_models_are_marked_as_trained_on_larger_latents(tmp_path: Path) -> None:
    for name, size in (("stablesr_768v_000139.ckpt", 96), ("stablesr_000117.ckpt", 64)):
        assert convert_checkpoint(saved(tmp_path, name), hints=HINTS)["unet"].config.sample_size == size


def test_an_assumption_is_said_with_the_way_to_override_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        converted = convert_checkpoint(saved(tmp_path, "mine.ckpt"), hints=HINTS)
    assert converted["scheduler"].config.prediction_type == "epsilon"
    assert "assumed" in caplog.text and "prediction_type" in caplog.text


def test_an_extract_on_the_wrong_base_is_refused(tmp_path: Path) -> None:
    networks = official.tiny_networks()
    state = official.official_spade(networks["adapter"], networks["unet"]) | official.official_encoder(
        networks["adapter"]
    )
    torch.save(state, tmp_path / "webui_768v_139.ckpt")
    for name in ("unet", "vae"):
        networks[name].save_pretrained(tmp_path / "base" / name)
    DDPMScheduler(prediction_type="epsilon").save_pretrained(tmp_path / "base" / "scheduler")
    arguments: dict[str, Any] = {"base": tmp_path / "base", "hints": HINTS}
    with pytest.raises(CheckpointError, match=r"v_prediction.*webui_768v_139.*epsilon"):
        convert_checkpoint(tmp_path / "webui_768v_139.ckpt", **arguments)
    forced = convert_checkpoint(tmp_path / "webui_768v_139.ckpt", prediction_type="v_prediction", **arguments)
    assert forced["scheduler"].config.prediction_type == "v_prediction"


@pytest.mark.parametrize("name", EMBEDDED)
def test_an_embedded_model_predicts_what_its_scheduler_says(name: str) -> None:
    """A UNet that was really trained."""
    folder = resolve_model(name)
    measured = measure_prediction(UNet2DConditionModel.from_pretrained(str(folder), subfolder="unet"))
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert measured is not None and measured.type == scheduler["prediction_type"]
