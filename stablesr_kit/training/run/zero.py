"""Optimizers that DeepSpeed shards over the processes (ZeRO 1 and 2), for several networks in one run.

Accelerate's DeepSpeed integration is not used: it supports one network, steps it in `backward`, and casts it to half
precision.
"""

import os
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin
from torch import Tensor, nn
from torch.optim import Optimizer

from stablesr_kit.errors import CheckpointError, ConfigError

LARGEST_BUCKET = 50_000_000
"""Gradients that are averaged at once; DeepSpeed always allocates this buffer, 200 MB."""

SHARED_STATES = "optimizer_*_of_*.bin"
"""Files of a checkpoint with optimizer states, one per network and process."""


def zero_stage(mixed_precision: str) -> int | None:
    """ZeRO stage of accelerate's config; None without DeepSpeed.

    Raises ConfigError for unsupported settings, or if DeepSpeed is not installed.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true":
        return None
    plugin = DeepSpeedPlugin()
    if plugin.zero_stage not in (1, 2):
        raise ConfigError(f"zero_stage: {plugin.zero_stage} must be 1 or 2; use configs/accelerate/fsdp.yaml beyond")
    for device in (plugin.offload_optimizer_device, plugin.offload_param_device):
        if device not in (None, "none"):
            raise ConfigError(f"DeepSpeed is asked to offload to {device}; use none for both offload devices")
    if mixed_precision == "fp16":
        raise ConfigError("DeepSpeed trains with mixed_precision=no or bf16, given fp16; use bf16")
    try:
        import deepspeed  # noqa: F401
    except ImportError:
        raise ConfigError(
            "distributed_type: DEEPSPEED needs deepspeed; install it with pip install 'stablesr-kit[deepspeed]'"
        ) from None
    return int(plugin.zero_stage)


def resting_groups(network: nn.Module) -> list[dict[str, Any]]:
    """The trained parameters, grouped by submodule: each group is stepped, or left alone, as a whole."""
    trained = [(name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad]
    parts = groupby(trained, key=lambda named: named[0].split(".")[0])
    return [{"params": [parameter for _, parameter in named]} for _, named in parts]


class ZeroOptimizer:
    """An optimizer whose states, and from stage 2 on gradients, are sharded over the processes.

    Every process has the whole network. A step consists of any number of backward passes, each followed by `take_in`;
    then `finish`, optionally `clip_shares`, and `step`. Groups without gradients are not stepped.

    network: on its device, with float32 parameters. optimizer: for its trained parameters.
    """

    def __init__(self, network: nn.Module, optimizer: Optimizer, stage: int, accelerator: Accelerator) -> None:
        import deepspeed

        trained = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
        bucket = min(trained, LARGEST_BUCKET)
        self._groups = [list(group["params"]) for group in optimizer.param_groups]
        network.to(memory_format=torch.contiguous_format)  # DeepSpeed flattens it
        self._engine, self._zero, _, _ = deepspeed.initialize(
            model=network,
            optimizer=optimizer,
            config={
                "train_micro_batch_size_per_gpu": 1,  # unused: the loops divide the samples themselves
                "zero_optimization": {"stage": stage, "reduce_bucket_size": bucket, "compute_grad_norm": False},
                "gradient_clipping": 0.0,  # the default is 1, for each network by itself
                "zero_allow_untested_optimizer": True,  # 8-bit AdamW
                "steps_per_print": None,
            },
        )
        self._stage, self._accelerator = stage, accelerator
        self._optimizer = optimizer  # now has this process's share of every group
        self._shares = [group["params"][0] for group in optimizer.param_groups]
        self._active: set[int] = set()  # groups that have gradients
        optimizer.register_step_pre_hook(self._let_rest)
        self._engine.set_gradient_accumulation_boundary(False)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Options of the optimizer, such as learning rates."""
        return self._optimizer.param_groups

    def take_in(self) -> None:
        """Add the gradients of a backward pass; at stage 2 only this process's shard of them is kept."""
        active = {i for i, group in enumerate(self._groups) if any(parameter.grad is not None for parameter in group)}
        if active:
            self._active |= active
            self._engine.allreduce_gradients()

    def finish(self) -> None:
        """End the backward passes of a step: average the gradients over the processes."""
        if not self._active:
            return
        self._engine.set_gradient_accumulation_boundary(True)
        if self._stage == 1:
            self._engine.allreduce_gradients()
        else:
            self._zero.finalize_gradient_accumulation_boundary()
        self._engine.set_gradient_accumulation_boundary(False)

    @property
    def gradients(self) -> list[Tensor]:
        """After `finish`, this process's share of the gradients."""
        return [gradient for i in self._active for gradient in self._zero.averaged_gradients[i]]

    def step(self) -> None:
        """Step every parameter that had a gradient since the last step, in every process."""
        if self._active:
            self._zero.refresh_fp32_params()  # its copy misses what a loop has written, such as replaced codes
            self._zero.step()

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self._zero.zero_grad()
        self._active.clear()

    def save(self, folder: Path, name: str) -> None:
        """Write this process's share of the states."""
        torch.save(self._optimizer.state_dict(), self._file(folder, name))

    def load(self, folder: Path, name: str) -> None:
        """Load the states. Raises CheckpointError if another number of processes has saved them."""
        file = self._file(folder, name)
        if not file.exists():
            raise CheckpointError(f"{file} is not there; resume as many processes by DeepSpeed as wrote the checkpoint")
        states = torch.load(file, map_location="cpu", weights_only=True)
        self._optimizer.load_state_dict(states)

    def _file(self, folder: Path, name: str) -> Path:
        process, processes = self._accelerator.process_index, self._accelerator.num_processes
        return folder / f"optimizer_{name}_{process + 1}_of_{processes}.bin"

    def _let_rest(self, *_: Any) -> None:
        """Remove the zeros that DeepSpeed puts for missing gradients; otherwise momentum and weight decay would act."""
        for i, share in enumerate(self._shares):
            if i not in self._active:
                share.grad = None


def clip_shares(optimizers: Sequence[ZeroOptimizer], max_norm: float, accelerator: Accelerator) -> float:
    """Clip all gradients of the optimizers to a total norm; returns the norm before."""
    gradients = [gradient for optimizer in optimizers for gradient in optimizer.gradients]
    squares = sum((gradient.square().sum() for gradient in gradients), torch.zeros((), device=accelerator.device))
    norm = accelerator.reduce(squares, reduction="sum").sqrt()
    for gradient in gradients:
        gradient.mul_((max_norm / (norm + 1e-6)).clamp(max=1))
    return float(norm)
