"""Training where processes share out parameters, gradients and optimizer states (FSDP) equals training in one."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from stablesr_kit.errors import ConfigError
from stablesr_kit.training.run.config import RunConfig
from stablesr_kit.training.run.run import TrainingRun
from tests.helpers.training_runs import ForkedRun, run_programs, tiny, working_folder, worst_difference

SHARDED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_AUTO_WRAP_POLICY": "NO_WRAP",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}
"""What `accelerate launch --config_file configs/accelerate/fsdp.yaml` tells the processes."""


def let_accelerate_shard_on_the_cpu() -> None:
    """torch shares out on CPUs too, but accelerate takes that only from GPUs: tell it that these are some."""
    begin = PartialState.__init__
    PartialState.__init__ = lambda self, cpu=False, **options: begin(self, False, **options)  # noqa: ARG005
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    with working_folder(tmp_path, "TRAIN_DATA") as folder:
        run_programs([tiny("train_autoencoder", "autoencoder", "--max_train_steps", "1")])
        yield folder


@pytest.mark.skipif(
    "STABLESR_KIT_TEST_SHARING" not in os.environ,
    reason="gloo's thread has crashed once where CPUs share parameters; set STABLESR_KIT_TEST_SHARING=1 to try",
)
@pytest.mark.usefixtures("folder")
def test_processes_that_share_parameters_take_the_steps_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen encoder, a decoder, its average, a discriminator that is trained and judges; accumulated and resumed."""

    def call(name: str, steps: int, samples: int, *flags: str) -> list[str]:
        common = ["--adam_epsilon", "1e-4", "--lr_scheduler", "constant", "--train_batch_size", str(samples)]
        shown = ["--validation_steps", "3", "--validation_hq_dir", "pictures"]
        flags = ("--output_dir", name, "--max_train_steps", str(steps), *common, *shown, *flags)
        return tiny("train_decoder", "decoder", *flags)

    run_programs([call("one", 3, 4)])
    for name, value in SHARDED.items():
        monkeypatch.setenv(name, value)
    accumulated = ["--gradient_accumulation_steps", "2"]
    calls = [call("cut", steps, 1, *accumulated) for steps in (2, 3)]
    ForkedRun(calls, 2, begin=let_accelerate_shard_on_the_cpu).finish()
    assert "FSDP" in Path("forked.log").read_text()
    for part in ("vae", "checkpoint-3/vae", "checkpoint-3/vae_ema", "checkpoint-3/discriminator"):
        assert worst_difference(f"one/{part}", f"cut/{part}") <= 1e-6, part
    assert Path("cut", "validation", "step-000003", "0.png").exists()


def test_fsdp_that_accelerate_would_silently_leave_out_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CPUs it would train by DDP instead."""
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="FSDP is asked for, and accelerate gives NO here; it takes GPUs"):
        TrainingRun(RunConfig(output_dir=str(tmp_path), max_train_steps=1))


@pytest.mark.parametrize(
    ("environment", "precision", "message"),
    [
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "no", "zero_stage: 3 must be 1 or 2"),
        ({"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, "no", "DeepSpeed is asked to offload to cpu"),
        ({}, "fp16", "DeepSpeed trains with mixed_precision=no or bf16, given fp16"),
        ({}, "no", "needs deepspeed; install it with pip install 'stablesr-kit\\[deepspeed\\]'"),
    ],
)
def test_what_deepspeed_cannot_do_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], precision: str, message: str
) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    for name, value in ({"ACCELERATE_USE_DEEPSPEED": "true"} | environment).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        TrainingRun(RunConfig(output_dir=str(tmp_path), max_train_steps=1, mixed_precision=precision))
