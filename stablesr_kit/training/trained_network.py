"""A network that a run steps, with what belongs to it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import nn
from torch.optim import Optimizer

from stablesr_kit.training.network_files import SavedPart, load_parts, save_network
from stablesr_kit.training.zero import ZeroOptimizer


def make_shareable(network: nn.Module, accelerator: Accelerator) -> None:
    """Change a network that FSDP is about to share out so that it can, and so that loops may call what is frozen."""
    network.to(accelerator.device)
    network.to(memory_format=torch.contiguous_format)
    frozen = [part for part in network.modules() if not any(weight.requires_grad for weight in part.parameters())]
    accelerator.state.fsdp_plugin.ignored_modules = frozen  # stays whole in every process


@contextmanager
def judging(network: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """For the forward passes in the context, a network that was prepared is not trained, and waits for no gradients.

    It must be called as it was prepared, or its parameters are not there where processes share them.
    """
    parameters = list(network.parameters())
    for parameter in parameters:
        parameter.requires_grad_(False)
    with accelerator.no_sync(network):
        yield
    # those it has now are others where processes share them: whole ones, until the next backward pass
    for parameter in [*parameters, *network.parameters()]:
        parameter.requires_grad_(True)


@dataclass(kw_only=True)
class TrainedNetwork:
    """A network that the run steps. Every process must call the methods that copy, save or load."""

    parts: list[SavedPart]
    """What of it checkpoints hold."""
    prepared: nn.Module
    """The network as the loop must call it, so that its gradients are those of all processes."""
    optimizer: Optimizer | ZeroOptimizer
    learning_rate: Callable[[int], float]
    """Learning rate of each step."""
    is_clipped: bool
    """Whether its gradients count for, and obey, max_grad_norm."""
    ema: EMAModel | None
    """Moving average of its trained parameters."""

    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        return [parameter for parameter in self.prepared.parameters() if parameter.requires_grad]

    def averaged(self, name: str, accelerator: Accelerator) -> Any:
        """A copy of the part saved as `name` with averaged weights; None off the main process."""
        part = next(part for part in self.parts if part.name == name)
        with self._averages_in():
            return part.copy_from(accelerator, self.prepared)

    def save(self, folder: Path, accelerator: Accelerator) -> None:
        """Write every part to folder/NAME, and with its averages to folder/NAME_ema."""
        self._save_parts(folder, "", accelerator)
        if self.ema is not None:
            with self._averages_in():
                self._save_parts(folder, "_ema", accelerator)
        if isinstance(self.optimizer, ZeroOptimizer):  # others are saved by accelerate
            self.optimizer.save(folder, self.parts[0].name)

    def load(self, folder: Path, step: int) -> None:
        """Take up what `save` has written after a step. Raises CheckpointError where it does not fit."""
        if self.ema is not None:
            load_parts(self.prepared, self.parts, folder, "_ema")
            self.ema.shadow_params = [parameter.detach().clone() for parameter in self.parameters()]
            self.ema.optimization_step = step
        load_parts(self.prepared, self.parts, folder)
        if isinstance(self.optimizer, ZeroOptimizer):
            self.optimizer.load(folder, self.parts[0].name)

    def _save_parts(self, folder: Path, suffix: str, accelerator: Accelerator) -> None:
        for part in self.parts:
            copied = part.copy_from(accelerator, self.prepared)
            if copied is not None:
                save_network(copied, folder / (part.name + suffix))

    @contextmanager
    def _averages_in(self) -> Iterator[None]:
        """For the time of the context the network has its averaged weights."""
        if self.ema is None:
            yield
            return
        self.ema.store(self.parameters())
        self.ema.copy_to(self.parameters())
        try:
            yield
        finally:
            self.ema.restore(self.parameters())
