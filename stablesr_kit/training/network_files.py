"""Networks in training as folders that diffusers loads, and back, also where processes share their parameters."""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from stablesr_kit.errors import CheckpointError, ConfigError
from stablesr_kit.training.writing import replacing_folder

Network = TypeVar("Network", bound=ModelMixin)


@dataclass(frozen=True, kw_only=True)
class SavedPart:
    """A part of a network in training that is saved as a folder of its own."""

    name: str
    """Of the folder."""
    path: str
    """Of the submodule, "" for the network itself."""
    blueprint: nn.Module
    """The part without its weights, on the meta device."""

    @classmethod
    def of(cls, network: nn.Module, name: str, path: str) -> Self:
        """The part of a network that no process has taken over yet."""
        return cls(name=name, path=path, blueprint=copy.deepcopy(network.get_submodule(path)).to("meta"))

    def copy_from(self, accelerator: Accelerator, prepared: nn.Module) -> Any:
        """A copy of the part as it is now; None off the main process. Every process must call it."""
        state = accelerator.get_state_dict(prepared)
        if not accelerator.is_main_process:
            return None
        prefix = self.path and f"{self.path}."
        copied = copy.deepcopy(self.blueprint)
        own = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        copied.load_state_dict({name: tensor.detach().clone() for name, tensor in own.items()}, assign=True)
        return copied

    def read(self, folder: Path) -> dict[str, Tensor]:
        """Weights of a saved part by their names in the whole network.

        Raises CheckpointError when they are not those of the blueprint.
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


def load_parts(prepared: nn.Module, parts: list[SavedPart], folder: Path, suffix: str = "") -> None:
    """Put the weights of folder/NAME + suffix of every part into the network; what is no part of it stays."""
    state: dict[str, Any] = {}
    for part in parts:
        state |= part.read(folder / (part.name + suffix))
    set_model_state_dict(prepared, state, options=StateDictOptions(full_state_dict=True, strict=False))


def save_network(network: nn.Module, folder: Path) -> None:
    """Write a network to a folder that appears whole; one without a config as its weights alone.

    Raises OutputError; what was there before is then still there.
    """
    with replacing_folder(folder) as beside:
        if isinstance(network, ModelMixin):
            network.save_pretrained(beside)
        else:
            state = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
            save_file(state, beside / SAFETENSORS_WEIGHTS_NAME)


def save_small_pipeline(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Write a pipeline in float16 to a folder that appears whole, without the paths its networks were trained at.

    Raises OutputError; what was there before is then still there.
    """
    with replacing_folder(folder) as beside:
        pipeline.to(torch.float16).save_pretrained(beside)
        for file in beside.glob("*/config.json"):
            options = json.loads(file.read_text())
            options.pop("_name_or_path", None)
            file.write_text(json.dumps(options, indent=2, sort_keys=True) + "\n")


def load_network(kind: type[Network], folder: str, option: str) -> Network:
    """The network of this class in a folder that an option names. Raises ConfigError where there is none."""
    file = Path(folder) / "config.json"
    name = json.loads(file.read_text()).get("_class_name") if file.is_file() else None
    if name != kind.__name__:
        raise ConfigError(
            f"{option}={folder} holds {name or 'no network'}, expected a trained {kind.__name__}; give the folder that "
            "training or conversion wrote"
        )
    network: Network = kind.from_pretrained(folder)
    return network
