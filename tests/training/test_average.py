"""average_pipelines.py: the mean of all weights, of pipelines and of checkpoints."""

import runpy
from pathlib import Path

import pytest
import torch

from stablesr_kit import StableSRPipeline
from stablesr_kit.errors import ConfigError
from tests.helpers.tiny import tiny_cfw, tiny_pipeline, tiny_vae

ROOT = Path(__file__).parents[2]
PROGRAM = runpy.run_path(str(ROOT / "training" / "average_pipelines.py"), run_name="average")


def average(output: Path, first: Path, *others: Path) -> None:
    config = PROGRAM["AverageConfig"](
        output_dir=str(output), pretrained_model=str(first), others=tuple(str(other) for other in others)
    )
    PROGRAM["main"](config)


def test_every_weight_is_the_mean_and_the_rest_is_the_first_pipelines(tmp_path: Path) -> None:
    for name, scale, steps in (("first", 1.0, 1), ("second", 3.0, 4)):
        pipeline = tiny_pipeline(with_text=False, default_steps=steps)
        for network in (pipeline.unet, pipeline.adapter, pipeline.vae, pipeline.cfw):
            for parameter in network.parameters():
                parameter.data *= scale
        pipeline.save_pretrained(tmp_path / name)
    checkpoint = tmp_path / "checkpoint-5"
    checkpoint.mkdir()
    for part in ("unet", "adapter", "vae", "cfw"):
        (tmp_path / "second" / part).rename(checkpoint / f"{part}_ema")

    average(tmp_path / "mean", tmp_path / "first", checkpoint)

    mean, first = (StableSRPipeline.from_pretrained(tmp_path / name) for name in ("mean", "first"))
    assert mean.config.default_steps == 1
    for part in ("unet", "adapter", "vae", "cfw"):
        for a, b in zip(getattr(mean, part).parameters(), getattr(first, part).parameters(), strict=True):
            torch.testing.assert_close(a, (2 * b).half().float(), rtol=1e-3, atol=1e-7)
    assert str(tmp_path) not in "".join(file.read_text() for file in (tmp_path / "mean").rglob("*.json"))


def test_pipelines_of_other_networks_are_refused(tmp_path: Path) -> None:
    tiny_pipeline(with_text=False).save_pretrained(tmp_path / "first")
    tiny_pipeline(with_text=False, cfw=tiny_cfw(tiny_vae(), num_rrdb=2)).save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match="other has another cfw than .*first; give pipelines of the same networks"):
        average(tmp_path / "mean", tmp_path / "first", tmp_path / "other")
    assert not (tmp_path / "mean").exists()
