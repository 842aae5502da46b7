"""Training where DeepSpeed shares out optimizer states and gradients equals training in one process."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.helpers.training_runs import (
    FACES,
    ForkedRun,
    assert_kills_change_nothing,
    losses,
    run_programs,
    tiny,
    weights,
    working_folder,
    worst_difference,
)

pytest.importorskip("deepspeed", reason="deepspeed is not installed; pip install 'stablesr-kit[deepspeed]'")

SHARED = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",  # as other files do; the run's own must count
    "DS_ACCELERATOR": "cpu",
}
"""What `accelerate launch --config_file configs/accelerate/deepspeed.yaml` tells the processes."""

RESULTS = {
    "decoder": ["vae", "checkpoint-3/vae", "checkpoint-3/vae_ema", "checkpoint-3/discriminator"],
    "prior": ["unet", "adapter", "checkpoint-3/unet_ema", "checkpoint-3/adapter_ema"],
    "stablesr": ["adapter", "checkpoint-3/adapter", "checkpoint-3/adapter_ema"],
}
"""What there is to compare, of a network and its discriminator, of two networks with one loss, and of one network."""

ADAPTIVE = [("train_vqgan", "vqgan", "vqgan"), ("train_codeformer", "codeformer_stage3", "codeformer")]
"""Programs with such a discriminator: their configs, and the names of their results."""

ROUNDING = ["--adam_epsilon", "1e-4"]
"""Keeps Adam from making whole steps of what rounding leaves of gradients that are zero."""


def over_gloo() -> None:
    """For processes on one CPU DeepSpeed would compile code of its own, which takes half a minute and a compiler."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def in_one_layout() -> None:
    """Weights lie as ZeRO needs them, without it too: what it rounds differently otherwise grows in a few steps."""
    over_gloo()
    torch.channels_last = torch.contiguous_format


def run_two(calls: list[list[str]], stage: int = 2, begin: Callable[[], None] = over_gloo) -> None:
    """Run programs in two processes of DeepSpeed."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (SHARED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)}).items():
            patch.setenv(name, value)
        ForkedRun(calls, 2, begin).finish()


@pytest.fixture
def photos(photo_runs: Path, tmp_path: Path) -> Iterator[Path]:
    """A working folder with what programs for photographs need."""
    with working_folder(tmp_path, "TRAIN_DATA") as folder:
        (folder / "runs").symlink_to(photo_runs)
        yield folder


@pytest.fixture
def faces(face_runs: Path, tmp_path: Path) -> Iterator[Path]:
    """A working folder with what programs for faces need."""
    with working_folder(tmp_path, "TRAIN_FACES", **FACES) as folder:
        (folder / "runs").symlink_to(face_runs)
        yield folder


@pytest.mark.usefixtures("photos")
@pytest.mark.parametrize(("program", "stage"), [("decoder", 1), ("decoder", 2), ("prior", 2), ("stablesr", 2)])
def test_two_processes_take_the_steps_of_one(program: str, stage: int) -> None:
    """Of accumulated batches, and resumed in between."""

    def call(name: str, steps: int, samples: int, *flags: str) -> list[str]:
        common = ["--lr_scheduler", "constant", "--train_batch_size", str(samples), *ROUNDING]
        return tiny(f"train_{program}", program, "--output_dir", name, "--max_train_steps", str(steps), *common, *flags)

    run_programs([call("one", 3, 4)])
    run_two([call("cut", steps, 1, "--gradient_accumulation_steps", "2") for steps in (2, 3)], stage)
    for result in RESULTS[program]:
        assert worst_difference(f"one/{result}", f"cut/{result}") <= 1e-6, result


@pytest.mark.usefixtures("faces")
def test_parts_that_rest_stay_as_they_were() -> None:
    """Fusion layers, in the steps that predict codes only: neither momentum nor decay moves them."""
    call = tiny("train_codeformer", "codeformer_stage3", "--adversarial_weight", "0", *ROUNDING)
    run_programs([[*call, "--output_dir", "one", "--train_batch_size", "4"]])
    run_two([[*call, "--output_dir", "two"]])
    assert worst_difference("one/codeformer", "two/codeformer") <= 1e-6


@pytest.mark.usefixtures("faces")
@pytest.mark.parametrize(("program", "config", "result"), ADAPTIVE)
def test_a_discriminator_of_adapted_weight_trains_as_by_ddp(program: str, config: str, result: str) -> None:
    """Its batch norms see the batch of a process, so that one process with the whole of it gives something else."""
    call = tiny(program, config, "--max_train_steps", "3", *ROUNDING)
    ForkedRun([[*call, "--output_dir", "ddp"]], 2, in_one_layout).finish()
    run_two([[*call, "--output_dir", "zero"]], begin=in_one_layout)
    for name in (result, "discriminator"):
        assert worst_difference(f"ddp/{name}", f"zero/{name}") <= 1e-6, name


@pytest.mark.usefixtures("photos")
def test_two_processes_killed_twice_end_as_if_they_had_not_been(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SHARED.items():
        monkeypatch.setenv(name, value)
    assert_kills_change_nothing(tiny("train_decoder", "decoder"), "vae", processes=2, begin=over_gloo)


@pytest.mark.usefixtures("photos")
def test_weights_stay_in_float32_under_autocast() -> None:
    call = tiny("train_decoder", "decoder", "--max_train_steps", "2", *ROUNDING)
    half = ["--mixed_precision", "bf16"]
    run_two([[*call, "--output_dir", "exact"], [*call, "--output_dir", "rounded", *half]])
    assert {tensor.dtype for tensor in weights("rounded/vae").values()} == {torch.float32}
    exact, rounded = losses("exact")[0]["pixel"], losses("rounded")[0]["pixel"]
    assert exact != rounded
    assert rounded == pytest.approx(exact, rel=0.01)
    ForkedRun([[*call, "--output_dir", "ddp", *half]], 2).finish()
    assert losses("ddp")[0]["pixel"] == pytest.approx(rounded, rel=1e-5)


@pytest.mark.usefixtures("photos")
def test_a_loss_that_is_not_finite_leaves_the_state_before_it(capsys: pytest.CaptureFixture[str]) -> None:
    call = tiny("train_decoder", "decoder", "--output_dir", "out", *ROUNDING)
    run_two([[*call, "--max_train_steps", "2"]])
    with pytest.raises(SystemExit, match="1"):
        run_programs([[*call, "--max_train_steps", "4"]])
    assert "checkpoint-2 was written by DeepSpeed; resume it with" in capsys.readouterr().err
    wrong = [*call, "--max_train_steps", "4", "--learning_rate", "1e30", "--max_grad_norm", "1e30"]
    with pytest.raises(AssertionError, match="that is not finite; the state before it is in out/diverged-4"):
        run_two([wrong])
    assert Path("out/diverged-4/vae").exists()
