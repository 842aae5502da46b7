"""Find the files of a model, in the package, a folder or the Hugging Face hub; and options for compiling networks."""

import json
import math
import os
import shutil
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open

from stablesr_kit.errors import CheckpointError, ConfigError, ModelNotFoundError

EMBEDDED: Mapping[str, str] = {"mini": "mini", "mini-preview": "mini_preview"}
"""Name of a StableSR model in the package -> its folder in the assets."""

EMBEDDED_FACES: Mapping[str, str] = {"mini": "mini_faces"}
"""Name of a CodeFormer in the package -> its folder in the assets."""

HUB_ARGUMENTS = ("cache_dir", "revision", "token", "local_files_only", "force_download")


def resolve_model(
    name_or_path: str | Path, variant: str | None = None, embedded: Mapping[str, str] = EMBEDDED, **kwargs: Any
) -> Path:
    """Folder with the files of a model; a hub repository is downloaded first.

    The whole repository is fetched, since DiffusionPipeline's own download refuses classes of third parties such as
    ours. embedded: models of this kind in the package. kwargs: those in `HUB_ARGUMENTS` are passed to the hub.

    Raises:
        ModelNotFoundError: nothing of this name is embedded, on disk or on the hub.
    """
    if name_or_path in embedded:
        return Path(str(resources.files("stablesr_kit"))) / "assets" / embedded[str(name_or_path)]
    folder = Path(name_or_path)
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise ModelNotFoundError(
                f"{folder} holds no model_index.json, expected a pipeline folder; make one with `stablesr convert`"
            )
        return folder
    if folder.is_file():
        raise ModelNotFoundError(
            f"{folder} is a file, expected a pipeline folder; make one with `stablesr convert {folder} -o DIR`"
        )
    return _download(str(name_or_path), variant, {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs})


def pipeline_config(folder: Path) -> dict[str, Any]:
    """Content of the `model_index.json` of a folder; empty if it cannot be read."""
    try:
        return dict(json.loads((folder / "model_index.json").read_bytes()))
    except (OSError, ValueError, TypeError):
        return {}  # loading it says what is wrong


def check_components(folder: Path, given: Mapping[str, Any]) -> None:
    """Refuse a pipeline folder without an adapter. given: components passed to from_pretrained, by name.

    Raises:
        ModelNotFoundError: there is no adapter; the message says how to get one.
    """
    try:
        index = json.loads((folder / "model_index.json").read_bytes())
    except ValueError:
        return  # loading it says what is wrong
    if given.get("adapter") is None and not any(index.get("adapter") or ()):
        raise ModelNotFoundError(
            f"{folder} is a {index.get('_class_name', 'pipeline')} without an adapter, which it needs to restore "
            "(and, for w above 0, a cfw); give adapter=StableSRAdapter.from_pretrained(...), or convert a StableSR "
            "checkpoint with `stablesr convert`"
        )


def parameter_count(folder: Path) -> int:
    """Number of values in the weight files of a model's folder (of one variant), read from their headers."""
    ending = f".{variant}" if (variant := only_variant(folder)) else ""
    files = [path for path in folder.glob("*/*.safetensors") if path.suffixes[:-1] == [ending] * bool(ending)]
    return sum(_numbers(path) for path in files)


def only_variant(folder: Path) -> str | None:
    """The variant, such as fp16, if a folder holds its weights in a single named one; None if no name is needed.

    Raises:
        CheckpointError: there are several variants and no weights without one.
    """
    suffixes = {tuple(path.suffixes[:-1]) for path in folder.glob("*/*.safetensors")}
    variants = sorted(found[0].removeprefix(".") for found in suffixes if found)
    if () in suffixes or not variants:
        return None
    if len(variants) > 1:
        raise CheckpointError(
            f"{folder}: holds its weights as {', '.join(variants)} and none without such a name; "
            "keep one of them in a folder, or give variant= in Python"
        )
    return variants[0]


def compile_options(device: torch.device, **given: Any) -> dict[str, Any]:
    """Options of `torch.compile` for networks that see the same size repeatedly; the given ones take precedence.

    On a GPU the default is to replay a step as CUDA graphs.

    Raises:
        ConfigError: the CPU's default needs a C++ compiler, and there is none.
    """
    options: dict[str, Any] = {"dynamic": False}
    if not {"mode", "options", "backend"} & given.keys():
        if device.type == "cuda":
            options["mode"] = "reduce-overhead"
        elif shutil.which(compiler := os.environ.get("CXX", "g++" if os.name == "posix" else "cl")) is None:
            raise ConfigError(
                f"compiling for the CPU needs a C++ compiler, and {compiler} is not found; "
                "install one, name it in the environment variable CXX, or do not compile"
            )
    return options | given


def carries_empty_prompt(folder: Path) -> bool:
    """Whether the adapter in a model's folder stores the empty prompt's embedding; if so, no text encoder is needed."""
    try:
        return json.loads((folder / "adapter" / "config.json").read_bytes())["prompt_length"] > 0
    except (OSError, ValueError, KeyError, TypeError):
        return False  # loading it says what is wrong


def _numbers(path: Path) -> int:
    try:
        with safe_open(path, framework="pt") as file:
            return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())
    except (OSError, SafetensorError):
        return 0  # loading it says what is wrong


def _download(repository: str, variant: str | None, hub_arguments: dict[str, Any]) -> Path:
    weights = f"*/*.{variant}*.safetensors*" if variant else "*/*.safetensors*"
    try:
        return Path(
            snapshot_download(
                repository,
                allow_patterns=["*.json", "*.txt", weights],
                ignore_patterns=None if variant else ["*.fp16.*", "*.bf16.*", "*.non_ema.*"],
                **hub_arguments,
            )
        )
    except (OSError, HFValidationError) as error:
        reason = str(error).splitlines()[0]
        raise ModelNotFoundError(
            f"{repository!r} is neither an embedded model ({', '.join(EMBEDDED)}), nor a folder, nor a hub repository "
            f"that can be fetched; check the name ({reason})"
        ) from error
