"""The README.md that every run leaves beside its results: what they are, what they were made from and how."""

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from stablesr_kit.training.run.config import RunConfig
from stablesr_kit.training.run.records import means_of, read_records
from stablesr_kit.version import __version__

DATA = ("train_data_dir", "lq_data_dir", "dataset_name", "shards", "latents", "samples", "pairs")
"""Options that name what was trained on."""


def model_card(
    config: RunConfig, results: dict[str, str], *, processes: int, samples: int, seconds: float
) -> ModelCard:
    """The card of a finished run, from its options and from the records in its output_dir.

    results: the class of each result by its folder. processes: of the last call. samples: per step. seconds: of all
    calls together.
    """
    program, folder = Path(sys.argv[0]).stem, Path(config.output_dir)
    options = dataclasses.asdict(config)
    origins = {name: value for name, value in options.items() if name.startswith("pretrained_") and value is not None}
    data = {name: options[name] for name in DATA if options.get(name)}
    metadata = ModelCardData(library_name="diffusers", pipeline_tag="image-to-image", tags=["stablesr-kit", program])
    last = read_records(folder / "losses.jsonl")[-config.logging_steps :]
    paragraphs = [
        f"---\n{metadata.to_yaml()}\n---",
        f"# {folder.resolve().name}",
        f"Trained by `{program}` of stablesr-kit {__version__}. "
        "The licences of the data and of what it started from hold for it.",
        _table(["folder", "class"], results.items()),
        f"Started from {_listed(origins) or 'nothing'}; trained on {_listed(data) or 'no data that an option names'}.",
        f"{config.max_train_steps} steps of {samples} samples in {seconds:.0f} s, at the end with {processes} "
        f"process{'es' if processes > 1 else ''}:",
        f"    accelerate launch {shlex.join(sys.argv)}",
        f"## Losses\n\nMeans over the last {len(last)} steps; those of all steps are in losses.jsonl.",
        _table(["loss", "mean"], (item for item in means_of(last).items() if item[0] not in ("step", "learning_rate"))),
    ]
    if validations := read_records(folder / "validation" / "metrics.jsonl"):
        names = [name for name in validations[-1] if "/" not in name]  # the others are those of single pictures
        rows = [[line.get(name, "") for name in names] for line in validations]
        paragraphs += ["## Validation\n\nMeans over the pictures in the folder validation.", _table(names, rows)]
    paragraphs.append(f"## Options\n\n```yaml\n{yaml.safe_dump(options, sort_keys=False)}```")
    return ModelCard("\n\n".join(paragraphs) + "\n")


def _listed(options: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} `{' '.join(value) if isinstance(value, tuple) else value}`" for name, value in options.items()
    )


def _table(head: list[str], rows: Any) -> str:
    """A table in Markdown; numbers with five digits."""
    lines = [head, ["---"] * len(head), *rows]
    cells = [[f"{cell:.5g}" if isinstance(cell, float) else str(cell) for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
