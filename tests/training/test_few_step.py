"""Students of few steps in every form: LoRA on a frozen base, consistency, several steps; what they end as."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from stablesr_kit.pipelines.stablesr import StableSRPipeline
from tests.helpers.training_runs import losses, run_program, tiny, weights, working_folder

FORMS = {
    "lora": ["--trained_parts", "[unet, adapter]", "--lora_rank", "2", "--w", "[0.0]", "--student_every", "2"],
    "consistency": [
        *("--trained_parts", "[unet, adapter]", "--consistency_weight", "1.0", "--distribution_weight", "0"),
        *("--pixel_weight", "0", "--flat_weights", "[0, 0]", "--adversarial_weight", "0"),  # nothing is decoded
    ],
    "fusion": ["--trained_parts", "[cfw]", "--w", "[1.0]", "--velocity_every", "0", "--distribution_weight", "0"],
}
"""Flags of each form."""


@pytest.fixture(scope="module", autouse=True)
def folder(photo_runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working folder, with a tiny pipeline and pairs."""
    with working_folder(tmp_path_factory.mktemp("few_step"), "TRAIN_DATA") as folder:
        shutil.copytree(photo_runs, folder / "runs")
        yield folder


def train(name: str, form: str, steps: int, *flags: str) -> Path:
    """A run of that form in the folder `name`."""
    common = ["--output_dir", name, "--lr_scheduler", "constant", "--max_train_steps", str(steps)]
    run_program(*tiny("train_few_step", "few_step", *common, *FORMS[form], *flags))
    return Path(name)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_resumes_to_the_bit_and_ends_as_a_pipeline_of_one_step(form: str) -> None:
    whole = train(f"whole/{form}", form, 6)
    train(f"halted/{form}", form, 2)
    resumed = train(f"halted/{form}", form, 6)
    assert (resumed / "losses.jsonl").read_text() == (whole / "losses.jsonl").read_text()
    for part in ("unet", "adapter", "vae", "cfw"):
        ours, theirs, before = (
            weights(Path(run, part)) for run in (resumed / "pipeline", whole / "pipeline", "runs/tiny/pipeline")
        )
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        assert ours.keys() == before.keys()
        moved = any(not torch.equal(ours[name], before[name]) for name in before)
        trained = {"lora": {"unet", "adapter"}, "fusion": {"cfw"}}.get(form, {"unet", "adapter"})
        assert moved == (part in trained), part
    pipeline = StableSRPipeline.from_pretrained(whole / "pipeline", dtype=torch.float32)
    assert pipeline.config.default_steps == 1
    restored = pipeline(Image.open("pictures/0.png").resize((16, 12)), w=0.5).images[0]
    assert restored.size == (64, 48)


def test_lora_is_merged_exactly_and_alone_in_its_checkpoints() -> None:
    run = train("merged", "lora", 4, "--learning_rate", "1e-2")
    lora = load_file(run / "checkpoint-4" / "unet_ema" / "diffusion_pytorch_model.safetensors")
    assert all("lora_" in name for name in lora)
    before, after = weights("runs/tiny/pipeline/unet"), weights(run / "pipeline" / "unet")
    down, up = (lora[f"conv_in.lora_{half}.default.weight"] for half in ("A", "B"))
    expected = before["conv_in.weight"].float() + torch.einsum("or,rihw->oihw", up[:, :, 0, 0], down)
    torch.testing.assert_close(after["conv_in.weight"].float(), expected, rtol=1e-3, atol=1e-4)
    assert (after["conv_in.weight"] != before["conv_in.weight"]).any()
    untouched = [
        name for name in before if name.startswith(("time_embedding", "down_blocks.0.resnets.0.time_emb_proj"))
    ]
    assert untouched and all(torch.equal(before[name], after[name]) for name in untouched)


def test_a_score_that_starts_as_the_teacher_gives_the_first_student_no_gradient() -> None:
    run = train("agreeing", "lora", 2, "--velocity_every", "0", "--student_every", "1")
    first = losses(run)[0]
    assert first["distribution_w0"] == 0 and first["score"] > 0


def test_validation_pictures_are_made_by_the_student(folder: Path) -> None:
    Image.open("pictures/0.png").resize((64, 48)).save(folder / "lq.png")
    (folder / "lq").mkdir()
    Image.open("pictures/0.png").resize((64, 48)).save(folder / "lq" / "0.png")
    run = train("watched", "lora", 2, "--validation_steps", "2", "--validation_lq_dir", "lq")
    pictures = [Image.open(run / "validation" / f"step-{step:06d}" / "0.png") for step in (0, 2)]
    assert pictures[0].size == (256, 192)
    assert "grid" in (run / "validation" / "metrics.jsonl").read_text()
