"""Training where DeepSpeed shares out optimizer states and gradients equals training in one process."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.training_runs import ForkedRun, run_programs, tiny, working_folder, worst_difference

pytest.importorskip("deepspeed", reason="deepspeed is not installed (pip install 'stablesr-kit[deepspeed]')")


def deepspeed(stage: int = 2) -> dict[str, str]:
    """What `accelerate launch --config_file configs/accelerate/deepspeed.yaml` tells the processes."""
    return {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage),
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
        "DS_ACCELERATOR": "cpu",
    }


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with working_folder(tmp_path_factory.mktemp("deepspeed"), "TRAIN_DATA") as folder:
        run_programs(
            [
                tiny("train_autoencoder", "autoencoder", "--max_train_steps", "1"),
                tiny("train_decoder", "decoder", "--max_train_steps", "1"),
                tiny("cache_latents", "latents"),
            ]
        )
        yield folder


PROGRAMS = {
    "decoder": ("train_decoder", ["vae", "checkpoint-3/vae", "checkpoint-3/vae_ema", "checkpoint-3/discriminator"]),
    "prior": ("train_prior", ["unet", "adapter"]),
}


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("config", PROGRAMS)
def test_processes_of_deepspeed_take_the_steps_of_one(config: str, stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    program, results = PROGRAMS[config]

    def call(name: str, steps: int, samples: int, *flags: str) -> list[str]:
        common = ["--adam_epsilon", "1e-4", "--lr_scheduler", "constant", "--train_batch_size", str(samples)]
        flags = ("--output_dir", name, "--max_train_steps", str(steps), *common, *flags)
        return tiny(program, config, *flags)

    whole, cut = f"{config}-{stage}/whole", f"{config}-{stage}/cut"
    run_programs([call(whole, 3, 4)])
    for name, value in deepspeed(stage).items():
        monkeypatch.setenv(name, value)
    ForkedRun([call(cut, steps, 1, "--gradient_accumulation_steps", "2") for steps in (2, 3)], 2).finish()
    for result in results:
        print(config, stage, result, worst_difference(f"{whole}/{result}", f"{cut}/{result}"))
        assert worst_difference(f"{whole}/{result}", f"{cut}/{result}") <= 1e-6, result
