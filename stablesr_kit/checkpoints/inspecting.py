"""Say what a file or folder is, without building anything from it."""

import itertools
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from stablesr_kit import storage
from stablesr_kit.checkpoints.canonical import Checkpoint, canonicalize, left_over
from stablesr_kit.checkpoints.detecting import (
    ONE_STEP,
    Config,
    Detection,
    Hints,
    Prediction,
    detect,
    prediction_from_name,
)
from stablesr_kit.checkpoints.key_maps import TITLES, Section
from stablesr_kit.checkpoints.reading import RawCheckpoint, read_checkpoint
from stablesr_kit.errors import CheckpointError

USES: Mapping[str, str] = {
    "stablesr": "stablesr convert {name} -o DIR",
    "stablesr extract": "stablesr convert {name} --base STABLE_DIFFUSION -o DIR",
    "cfw": "stablesr convert STABLESR.ckpt --cfw {name} -o DIR",
    "stable diffusion": "stablesr convert EXTRACT --base {name} -o DIR",
    **dict.fromkeys(("codeformer", "vqgan", "vqgan discriminator"), "stablesr convert --codeformer {name} -o DIR"),
    **dict.fromkeys(ONE_STEP, "stablesr convert {name} --base STABLE_DIFFUSION -o DIR"),
    "pipeline": "stablesr restore PHOTO -o OUT --model {name}",
    "one-step pipeline": "stablesr restore PHOTO -o OUT --model {name}",
    "face pipeline": "stablesr faces PHOTO -o OUT --model {name}",
    "base": "stablesr convert EXTRACT --base {name} -o DIR",
}
"""The command that uses a checkpoint of each kind."""

SUMMARY = (
    *("block_out_channels", "layers_per_block", "cross_attention_dim", "attention_head_dim", "use_linear_projection"),
    *("num_attention_heads", "cond_channels", "hidden_channels", "modulation", "latent_channels", "scaling_factor"),
    *("hidden_size", "num_hidden_layers", "channels", "levels", "num_rrdb", "growth_channels"),
    *("image_size", "base_channels", "channel_multipliers", "codebook_size", "code_channels", "quantization"),
    *("dim", "num_heads", "num_layers", "fuse_sizes"),
)
"""The config fields in which models differ."""


@dataclass(frozen=True, kw_only=True)
class CheckpointReport:
    """What is known about a checkpoint; `str()` gives text for people."""

    path: Path
    kind: str
    """Family of the checkpoint; "pipeline", "face pipeline", "base" and "network" are folders in diffusers' layout."""
    description: str
    format: str
    size_bytes: int
    dtypes: tuple[str, ...]
    parts: Mapping[str, int]
    """Numbers in each part."""
    configs: Mapping[str, Config]
    """The diffusers config of each part that has one."""
    prediction: Prediction | None
    """None: it has no UNet, or the prediction type must be measured, which `convert` does."""
    command: str | None
    """The command that uses it."""
    missing: tuple[str, ...]
    """What else is needed, and why."""
    notes: tuple[str, ...]
    sha256: str | None

    def __str__(self) -> str:
        lines = [
            ("format", f"{self.format}, {_megabytes(self.size_bytes)}, {' and '.join(self.dtypes)}"),
            *(("holds", f"{part}: {_millions(numbers)}") for part, numbers in self.parts.items()),
            *(("config", f"{part}: {_summary(config)}") for part, config in self.configs.items()),
        ]
        if "unet" in self.configs or self.prediction:
            lines.append(("predicts", str(self.prediction or "no name tells; convert measures it")))
        lines += [("needs", what) for what in self.missing]
        lines += [("note", note) for note in self.notes]
        lines += [("sha256", self.sha256)] if self.sha256 else []
        lines += [("use", self.command)] if self.command else []
        return "\n".join([f"{self.path}: {self.description}", *(f"  {label:9} {text}" for label, text in lines)])


def inspect_checkpoint(
    path: str | Path, *, hints: Hints | None = None, tensors_only: bool = False, sha256: bool = False
) -> CheckpointReport:
    """What a weight file or a folder in diffusers' layout is. Arguments as `convert_checkpoint`.

    Raises `CheckpointError` for what is neither.
    """
    path = Path(path)
    if path.is_dir():
        return _inspect_folder(path)
    raw = read_checkpoint(path, tensors_only=tensors_only)
    checkpoint = canonicalize(raw)
    found = detect(checkpoint, hints)
    sections = checkpoint.sections
    configs = {name: getattr(found, name) for name in ("unet", "vae", "text", "adapter", "cfw", "faces")}
    command = USES.get(found.family)
    return CheckpointReport(
        path=path,
        kind=found.family,
        description=found.description,
        format=raw.format,
        size_bytes=path.stat().st_size,
        dtypes=_dtypes(sections),
        parts={
            "faces" if found.faces else TITLES[part]: sum(map(Tensor.numel, tensors.values()))
            for part, tensors in sections.items()
        },
        configs={name: config for name, config in configs.items() if config is not None},
        prediction=prediction_from_name(path.name) if found.unet or found.adapter else None,
        command=command.format(name=path.name) if command else None,
        missing=tuple(_missing(found)),
        notes=tuple(_notes(raw, checkpoint, found)),
        sha256=storage.sha256(path) if sha256 else None,
    )


def _missing(found: Detection) -> list[str]:
    needs = []
    if found.family == "stablesr extract":
        needs.append("the Stable Diffusion 2.1 it belongs to (--base): it holds only the adapter")
    if found.family in ONE_STEP:
        from stablesr_kit.checkpoints.one_step import SYSTEMS  # beside diffusers, whose import takes seconds

        needs.append(f"{SYSTEMS[found.family].base} (--base)")
    if found.family == "cfw":
        needs.append("a StableSR checkpoint: it holds only the decoder's part")
    if found.adapter is not None and found.cfw is None:
        needs.append("vqgan_cfw_00011.ckpt (--cfw) for w above 0")
    if found.family == "stablesr" and found.text is None:
        needs.append("prompt_embeds at every call: it has no text encoder")
    return needs


def _notes(raw: RawCheckpoint, checkpoint: Checkpoint, found: Detection) -> list[str]:
    notes = list(checkpoint.notes)
    facts = [f"{key} {raw.content[key]}" for key in ("epoch", "global_step") if isinstance(raw.content.get(key), int)]
    if facts:
        notes.append(f"training run: {', '.join(facts)}")
    if raw.placeholders:
        notes.append(f"replaced by placeholders, nothing was run: {', '.join(raw.placeholders)}")
    known = {part for part, config in (("unet", found.unet), ("vae", found.vae), ("text", found.text)) if config}
    if known or found.adapter or found.cfw:
        unknown = left_over(checkpoint.sections.get("other", {}))
        if unknown:
            notes.append(f"not understood: {', '.join(unknown)}")
    return notes


def _inspect_folder(folder: Path) -> CheckpointReport:
    """A pipeline or a network in diffusers' layout, by its JSON files and the headers of its weights."""
    index = _json(folder / "model_index.json")
    if index is not None:
        names = [name for name, value in index.items() if isinstance(value, list) and value[0]]
        folders = {name: folder / name for name in names}
        kind, needed, description = _pipeline_kind(names, index)
    elif (config := _json(folder / "config.json")) is not None and "_class_name" in config:
        folders = {str(config["_class_name"]): folder}
        kind, needed, description = "network", (), f"a folder of {config['_class_name']}"
    else:
        raise CheckpointError(f"{folder} holds no model_index.json; expected a weight file or a pipeline folder")
    weights = {name: sorted(part.glob("*.safetensors")) for name, part in folders.items()}
    headers = {name: [_header(file) for file in files] for name, files in weights.items() if files}
    scheduler = _json(folder / "scheduler" / "scheduler_config.json") or {}
    command = USES.get(kind)
    return CheckpointReport(
        path=folder,
        kind=kind,
        description=description,
        format="diffusers folder",
        size_bytes=sum(file.stat().st_size for files in weights.values() for file in files),
        dtypes=tuple(sorted({dtype for header in headers.values() for file in header for dtype in file})),
        parts={name: sum(sum(file.values()) for file in files) for name, files in headers.items()},
        configs={name: config for name in headers if (config := _json(folders[name] / "config.json"))},
        prediction=_prediction_of_folder(index or {}, scheduler),
        command=command.format(name=folder) if command else None,
        missing=tuple(f"{name}, which is absent" for name in needed if name not in folders),
        notes=(),
        sha256=None,
    )


def _prediction_of_folder(index: dict[str, Any], scheduler: dict[str, Any]) -> Prediction | None:
    if "prediction" in index:  # of a one-step restorer, which may predict another thing than its base
        return Prediction(index["prediction"], "by its config", is_certain=True)
    if "prediction_type" in scheduler:
        return Prediction(scheduler["prediction_type"], "by its scheduler", is_certain=True)
    return None


def _pipeline_kind(names: list[str], index: dict[str, Any]) -> tuple[str, tuple[str, ...], str]:
    """Kind of a pipeline folder with these components, the components it needs, and what it is called."""
    if "codeformer" in names:
        return "face pipeline", (), f"a CodeFormer pipeline folder, made to {index.get('task', 'restore')} faces"
    needed = ("unet", "vae", "scheduler")
    if index.get("_class_name") == "OneStepPipeline":
        return "one-step pipeline", needed, "a folder of a restorer of one step or a few"
    if "adapter" in names:
        return "pipeline", needed, "a StableSR pipeline folder"
    kind = "base" if all(name in names for name in needed) else "unknown"
    return kind, needed, f"a folder of {index.get('_class_name', 'diffusers')}"


def _json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is a JSON {type(content).__name__}; expected named fields")
    return content


def _header(path: Path) -> Counter[str]:
    """Dtype -> number of values of this dtype in a safetensors file."""
    numbers: Counter[str] = Counter()
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                part = file.get_slice(name)
                numbers[part.get_dtype()] += math.prod(part.get_shape())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or cut short ({error})") from error
    return numbers


def _dtypes(sections: Mapping[Section, Mapping[str, Tensor]]) -> tuple[str, ...]:
    networks = (tensors for part, tensors in sections.items() if part != "other" or len(sections) == 1)
    tensors = itertools.chain.from_iterable(part.values() for part in networks)
    return tuple(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}))


def _summary(config: Config) -> str:
    return ", ".join(f"{key} {_value(config[key])}" for key in SUMMARY if config.get(key) is not None)


def _value(value: Any) -> str:
    return "-".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.1f} MB"


def _millions(count: int) -> str:
    return f"{count / 1e6:,.2f} M"
