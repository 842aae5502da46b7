"""Networks in training: saving as diffusers folders, averaging and loading, also under FSDP."""

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from diffusers.models.modeling_utils import ModelMixin
from diffusers.training_utils import EMAModel
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.optim import Optimizer

from stablesr_kit.errors import CheckpointError, ConfigError
from stablesr_kit.storage import replacing_folder
from stablesr_kit.training.run.config import CheckedOptions
from stablesr_kit.training.run.zero import ZeroOptimizer

Network = TypeVar("Network", bound=ModelMixin)


class Weights(nn.Module):
    """Some of a network's weights, by their names in it."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, weight in weights.items():
            holder: nn.Module = self
            *path, last = name.split(".")
            for step in path:
                if not hasattr(holder, step):
                    holder.add_module(step, nn.Module())
                holder = getattr(holder, step)
            holder.register_parameter(last, nn.Parameter(weight.detach(), requires_grad=False))


@dataclass(frozen=True, kw_only=True)
class SavedPart:
    """A part of a network in training, saved in its own folder."""

    name: str
    """Name of the folder."""
    path: str
    """Name of the submodule; "" is the network itself."""
    blueprint: nn.Module
    """The part without its weights, on the meta device."""

    @classmethod
    def of(cls, network: nn.Module, name: str, path: str, *, only_trained: bool = False) -> Self:
        """From a network not yet prepared by accelerate. only_trained: save only weights that require gradients."""
        part = network.get_submodule(path)
        if only_trained:
            trained = {name: weight for name, weight in part.named_parameters() if weight.requires_grad}
            return cls(name=name, path=path, blueprint=Weights(trained).to("meta"))
        return cls(name=name, path=path, blueprint=copy.deepcopy(part).to("meta"))

    def copy_from(self, accelerator: Accelerator, prepared: nn.Module) -> Any:
        """A copy of the part; None outside the main process. Every process must call it."""
        state = self._state(accelerator, prepared)
        if state is None:
            return None
        copied = copy.deepcopy(self.blueprint)
        copied.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
        return copied

    def write(self, accelerator: Accelerator, prepared: nn.Module, folder: Path) -> None:
        """Write the part, from the main process. Every process must call it."""
        state = self._state(accelerator, prepared)
        if state is not None:
            self.blueprint.load_state_dict(state, assign=True)  # shares the weights, for this moment
            _write(self.blueprint, folder)
            self.blueprint.to("meta")

    def read(self, folder: Path) -> dict[str, Tensor]:
        """Weights of a saved part, by their names in the whole network.

        Raises CheckpointError if names or shapes differ from the blueprint.
        """
        state = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
        expected = {name: tuple(tensor.shape) for name, tensor in self.blueprint.state_dict().items()}
        found = {name: tuple(tensor.shape) for name, tensor in state.items()}
        for name in [*expected, *found]:
            if expected.get(name) != found.get(name):
                raise CheckpointError(
                    f"{folder}: {name} has shape {found.get(name)}, the options ask for {expected.get(name)}; "
                    "resume with the options the checkpoint was written with, or give another output_dir"
                )
        prefix = self.path and f"{self.path}."
        return {prefix + name: tensor for name, tensor in state.items()}

    def _state(self, accelerator: Accelerator, prepared: nn.Module) -> dict[str, Tensor] | None:
        """The weights, by their names in the part; shared with the network if possible."""
        state = accelerator.get_state_dict(prepared)
        if not accelerator.is_main_process:
            return None
        prefix = self.path and f"{self.path}."
        return {name: state[prefix + name].detach() for name in self.blueprint.state_dict()}


def load_parts(prepared: nn.Module, parts: list[SavedPart], folder: Path, suffix: str = "") -> None:
    """Load folder/NAME + suffix of every part into the network; other weights stay as they are."""
    state: dict[str, Any] = {}
    for part in parts:
        state |= part.read(folder / (part.name + suffix))
    set_model_state_dict(prepared, state, options=StateDictOptions(full_state_dict=True, strict=False))


def save_network(network: nn.Module | DiffusionPipeline, folder: Path) -> None:
    """Write a network to a folder, whole or not at all: without a config only its weights, a pipeline in float16.

    Raises OutputError; what was there before is then still there.
    """
    if isinstance(network, DiffusionPipeline):
        save_small_pipeline(network, folder)
        return
    with replacing_folder(folder) as part:
        _write(network, part)


def _write(network: nn.Module, folder: Path) -> None:
    if isinstance(network, ModelMixin):
        network.save_pretrained(folder)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
        save_file(state, folder / SAFETENSORS_WEIGHTS_NAME)


def save_small_pipeline(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Write a pipeline in float16 to a folder, whole or not at all, without the paths of its training.

    Raises OutputError; what was there before is then still there.
    """
    with replacing_folder(folder) as part:
        for component in pipeline.components.values():
            if isinstance(component, nn.Module):
                component.half()  # to() of diffusers' models warns even if nothing is wrong
        pipeline.save_pretrained(part)
        for file in (part / "model_index.json", *part.glob("*/config.json")):
            options = json.loads(file.read_text())
            options.pop("_name_or_path", None)
            file.write_text(json.dumps(options, indent=2, sort_keys=True) + "\n")


def load_network(kind: type[Network], folder: str, option: str) -> Network:
    """The network of this class in the folder of an option. Raises ConfigError if there is none."""
    file = Path(folder) / "config.json"
    name = json.loads(file.read_text()).get("_class_name") if file.is_file() else None
    if name != kind.__name__:
        raise ConfigError(
            f"{option}={folder} holds {name or 'no network'}, expected a trained {kind.__name__}; give the folder that "
            "training or conversion wrote"
        )
    network: Network = kind.from_pretrained(folder)
    return network


def prepare_for_fsdp(network: nn.Module, accelerator: Accelerator) -> None:
    """Prepare a network for FSDP. Frozen modules stay whole in every process, so that loops can call them."""
    network.to(accelerator.device)
    network.to(memory_format=torch.contiguous_format)
    frozen = [part for part in network.modules() if not any(weight.requires_grad for weight in part.parameters())]
    accelerator.state.fsdp_plugin.ignored_modules = frozen  # stays whole in every process


@contextmanager
def judging(network: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """Context in which forward passes of a prepared network give it no gradients, and DDP expects none.

    Call the prepared network itself: only then FSDP gathers its parameters.
    """
    parameters = list(network.parameters())
    for parameter in parameters:
        parameter.requires_grad_(False)
    with accelerator.no_sync(network):
        yield
    # under FSDP its parameters are other objects now: whole ones, until the next backward pass
    for parameter in [*parameters, *network.parameters()]:
        parameter.requires_grad_(True)


@dataclass(kw_only=True)
class TrainedNetwork:
    """A network with its optimizer. Every process must call the methods that copy, save or load."""

    parts: list[SavedPart]
    """The parts that checkpoints hold."""
    prepared: nn.Module
    """The network for the loop to call, with gradients averaged over all processes."""
    optimizer: Optimizer | ZeroOptimizer
    learning_rate: Callable[[int], float]
    """Learning rate of each step."""
    is_clipped: bool
    """Whether max_grad_norm applies to its gradients."""
    ema: EMAModel | None
    """Moving average of its trained parameters."""

    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters."""
        return [parameter for parameter in self.prepared.parameters() if parameter.requires_grad]

    def averaged(self, name: str, accelerator: Accelerator) -> Any:
        """A copy of the part saved as `name`, with averaged weights; None outside the main process."""
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
        """Load what `save` wrote after a step. Raises CheckpointError if it does not fit."""
        if self.ema is not None:
            load_parts(self.prepared, self.parts, folder, "_ema")
            self.ema.shadow_params = [parameter.detach().clone() for parameter in self.parameters()]
            self.ema.optimization_step = step
        load_parts(self.prepared, self.parts, folder)
        if isinstance(self.optimizer, ZeroOptimizer):
            self.optimizer.load(folder, self.parts[0].name)

    def _save_parts(self, folder: Path, suffix: str, accelerator: Accelerator) -> None:
        for part in self.parts:
            part.write(accelerator, self.prepared, folder / (part.name + suffix))

    @contextmanager
    def _averages_in(self) -> Iterator[None]:
        """Context in which the network has its averaged weights."""
        if self.ema is None:
            yield
            return
        self.ema.store(self.parameters())
        self.ema.copy_to(self.parameters())
        try:
            yield
        finally:
            self.ema.restore(self.parameters())


@dataclass(frozen=True, kw_only=True)
class InterpolationOptions(CheckedOptions):
    """Mixing the result with the network that the run started from."""

    trained_share: float = 1.0
    """Share of the trained weights in the result; the rest are the weights that the run started from (network
    interpolation, Wang et al. 2018, ESRGAN). Trades clean against textured results."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.trained_share <= 1:
            raise ConfigError(f"trained_share={self.trained_share} must be from 0 to 1")


@torch.no_grad()
def interpolate(trained: nn.Module, first: nn.Module, options: InterpolationOptions) -> None:
    """Set every parameter of `trained` to share * trained + (1 - share) * first, for networks of one class."""
    for parameter, before in zip(trained.parameters(), first.parameters(), strict=True):
        parameter.lerp_(before.to(parameter), 1 - options.trained_share)
