"""What goes wrong in a training run ends in one line and an exit status, and loses nothing."""

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from stablesr_kit.training.run.state import is_whole
from tests.helpers.training_runs import (
    losses,
    run_program,
    save_smooth_pictures,
    tiny,
    weights,
    working_folder,
    worst_difference,
)

USAGE, FAILURE = 2, 1
"""Exit statuses."""


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working folder, with a run of six steps."""
    with working_folder(tmp_path_factory.mktemp("trouble"), "TRAIN_DATA") as folder:
        train("whole", *SIX_STEPS)
        yield folder


SIX_STEPS = ["--max_train_steps", "6", "--checkpoints_total_limit", "null"]


def train(output_dir: str, *flags: str) -> None:
    run_program(*tiny("train_autoencoder", "autoencoder", "--output_dir", output_dir, *flags))


def told(capsys: pytest.CaptureFixture[str], status: int, program: str, *flags: str) -> str:
    """The one line that a program ends with, and its exit status is that."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        run_program(program, *flags)
    _, *errors = capsys.readouterr().err.split("error: ")
    assert exit.value.code == status, errors
    (error,) = errors
    assert error.count("\n") == 1
    return error


def told_by_training(capsys: pytest.CaptureFixture[str], status: int, *flags: str) -> str:
    return told(capsys, status, *tiny("train_autoencoder", "autoencoder", "--output_dir", "told", *flags))


def test_a_loss_that_is_no_number_stops_at_its_step_with_the_state_before_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ["--output_dir", "diverging", "--lr_scheduler", "constant_with_warmup", "--lr_warmup_steps", "0"]
    flags += ["--checkpointing_steps", "1", "--max_train_steps", "4"]
    line = told(capsys, FAILURE, *tiny("train_autoencoder", "autoencoder", *flags, "--learning_rate", "1e30"))
    assert "step 2 gave" in line and "diverging/diverged-2" in line and "lower learning_rate" in line
    assert [record["step"] for record in losses("diverging")] == [1]
    assert is_whole(Path("diverging/diverged-2"))
    assert worst_difference("diverging/diverged-2/vae", "diverging/checkpoint-1/vae") == 0
    # the weights before the bad step are no use here, but others would be: a run goes on from where it is sent
    run_program(*tiny("train_autoencoder", "autoencoder", *flags, "--resume_from_checkpoint", "whole/checkpoint-2"))
    assert [record["step"] for record in losses("diverging")][-2:] == [3, 4]


def test_a_checkpoint_that_was_cut_off_is_named_and_the_last_whole_one_is_taken(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    cut = Path("cut")
    shutil.copytree("whole", cut)
    shutil.rmtree(cut / "vae")
    network = cut / "checkpoint-6" / "vae" / "diffusion_pytorch_model.safetensors"
    network.write_bytes(network.read_bytes()[:-100])
    (cut / "checkpoint-4" / "optimizer.bin").unlink()
    (cut / ".checkpoint-8.part").mkdir()
    train("cut", *SIX_STEPS)
    for step in (4, 6):
        assert f"cut/checkpoint-{step} was cut off while it was written and is ignored" in caplog.text
    assert "resumed cut/checkpoint-2 of 6 steps" in caplog.text
    assert (cut / "losses.jsonl").read_text() == Path("whole/losses.jsonl").read_text()
    for name in ("vae", "checkpoint-6/vae", "checkpoint-6/vae_ema"):
        assert worst_difference(cut / name, Path("whole") / name) == 0


def test_options_that_were_changed_since_the_checkpoint_are_named(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    shutil.copytree("whole", "changed")
    train("changed", *SIX_STEPS)
    assert "resumed changed/checkpoint-6 of 6 steps" in caplog.text and "other options" not in caplog.text
    train("changed", *SIX_STEPS, "--learning_rate", "2e-3", "--logging_steps", "1")
    assert (
        "changed/checkpoint-6 was written with other options: learning_rate is 0.002, was 0.001; "
        "logging_steps is 1, was 2" in caplog.text
    )


def test_a_checkpoint_of_another_network_is_refused_by_shape(capsys: pytest.CaptureFixture[str]) -> None:
    before = weights("whole/checkpoint-6/vae")
    flags = ["--output_dir", "whole", *SIX_STEPS, "--block_out_channels", "[8, 24, 16]"]
    line = told(capsys, FAILURE, *tiny("train_autoencoder", "autoencoder", *flags))
    assert "has shape" in line and "the options ask for" in line and "another output_dir" in line
    assert weights("whole/checkpoint-6/vae").keys() == before.keys()


def test_pictures_that_cannot_be_used_are_counted_and_named_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    save_smooth_pictures(Path("mixed"), count=2)
    good = Path("mixed/0.png").read_bytes()
    Path("mixed/cut.png").write_bytes(good[: len(good) // 2])
    Path("mixed/text.jpg").write_text("no picture")
    Image.new("RGB", (200, 20)).save("mixed/narrow.png")
    train("mixed_run", "--train_data_dir", "mixed")
    (line,) = [record.getMessage() for record in caplog.records if "were skipped" in record.getMessage()]
    assert line.startswith("3 of 5 photographs were skipped: ")
    for named in ("cut.png (damaged)", "text.jpg (damaged)", "narrow.png (smaller than a crop)"):
        assert named in line
    assert len(losses("mixed_run")) == 4


def test_folders_without_a_picture_to_train_on_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty").mkdir()
    save_smooth_pictures(Path("tiny"), height=24, width=24)
    assert "empty" in told_by_training(capsys, FAILURE, "--train_data_dir", "empty")
    assert "nowhere" in told_by_training(capsys, FAILURE, "--train_data_dir", "nowhere")
    line = told_by_training(capsys, FAILURE, "--train_data_dir", "tiny")
    assert "no photograph can be used" in line and "smaller than a crop" in line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--learnig_rate", "1"], "did you mean 'learning_rate'"),
        (["--train_batch_size", "many"], "train_batch_size=many must be int"),
        (["--mixed_precision", "fp8"], "must be auto, no, fp16 or bf16"),
        (["--lr_scheduler", "linaer"], "lr_scheduler='linaer' is unknown; use one of"),
        (["--resume_from_checkpoint", "whole"], "is no whole checkpoint; give latest, null, or"),
        (["--train_data_dir", "[]"], "no photographs given"),
        (["--pretrained_vae", "nowhere"], "pretrained_vae=nowhere"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--config", "broken.yaml"], "broken.yaml"),
        (["--config", "list.yaml"], "list.yaml holds no `key: value` lines"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("broken.yaml").write_text("a: [")
    Path("list.yaml").write_text("- a")
    assert message in told_by_training(capsys, USAGE, *flags)


@pytest.mark.parametrize(
    ("program", "config", "flags"),
    [
        ("train_decoder", "decoder", ["--pretrained_vae", "nowhere"]),
        ("train_prior", "prior", ["--latents", "nowhere"]),
        ("train_stablesr", "stablesr", ["--pretrained_vae", "whole/vae", "--pretrained_unet", "nowhere"]),
        ("train_stablesr", "stablesr", ["--pretrained_unet", "null", "--pretrained_model", "nowhere"]),
        ("train_cfw", "cfw", ["--samples", "nowhere"]),
        ("cache_latents", "latents", ["--pretrained_vae", "nowhere"]),
        ("generate_cfw_data", "cfw_data", ["--pretrained_model", "nowhere"]),
        ("assemble_pipeline", "pipeline", ["--pretrained_vae", "nowhere"]),
    ],
)
def test_what_a_program_needs_and_does_not_find_is_named(
    program: str, config: str, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    status = FAILURE if flags[-2] in ("--latents", "--samples", "--pretrained_model") else USAGE
    assert "nowhere" in told(capsys, status, *tiny(program, config, "--output_dir", "told", *flags))
