"""Validation during a run: pictures from the current averaged weights, with the same noise every time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn

from stablesr_kit.errors import ConfigError
from stablesr_kit.spaces import image_to_pixels, pixels_to_image
from stablesr_kit.storage import replacing_folder
from stablesr_kit.training.data.sources import FolderPhotos, decode
from stablesr_kit.training.run.config import CheckedOptions
from stablesr_kit.training.run.reporting import StepRecords, means_of

SMALLEST_PX = 32
"""Smallest side of a picture that metrics accept."""


@dataclass(frozen=True, kw_only=True)
class ValidationOptions(CheckedOptions):
    """Validation while training."""

    validation_steps: int = 0
    """Validation pictures are made with averaged weights at the start, at every n-th step, and at the end; 0: never."""
    num_validation_images: int = 4
    """Number of validation pictures, the first ones by name."""
    niqe_statistics: str | None = None
    """File niqe_pris_params.npz of the published NIQE; None: no NIQE."""
    metric_weights: str | None = None
    """Folder with lpips_alex.safetensors, vgg16_fp16.safetensors and the weights of DISTS; None: no LPIPS and DISTS."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.validation_steps < 0 or self.num_validation_images < 1:
            raise ConfigError(
                f"validation_steps={self.validation_steps} must be at least 0, and "
                f"num_validation_images={self.num_validation_images} at least 1"
            )


@dataclass(frozen=True, kw_only=True)
class PhotoValidationOptions(ValidationOptions):
    """Photographs for validation, which the network reconstructs."""

    validation_hq_dir: str | None = None
    """Folder of photographs that are not trained on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.validation_steps and self.validation_hq_dir is None:
            raise ConfigError("validation_steps is given without validation_hq_dir, the folder of the photographs")


@dataclass(frozen=True, kw_only=True)
class RestorationValidationOptions(ValidationOptions):
    """Photographs for validation, which the network restores."""

    validation_lq_dir: str | None = None
    """Folder of damaged photographs."""
    validation_hq_dir: str | None = None
    """Folder of their ground truth, with the same names; None: no ground truth."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.validation_steps and self.validation_lq_dir is None:
            raise ConfigError("validation_steps is given without validation_lq_dir, the folder of the photographs")


class Example(NamedTuple):
    """A picture to validate with; images (1, 3, H, W) in [-1, 1]."""

    name: str
    lq: Tensor
    """The input of the network."""
    hq: Tensor | None
    """The ground truth, if there is one."""
    latent: Tensor | None = None
    """The sample (1, C, h, w) between the two, for fusion layers."""


def photo_examples(options: PhotoValidationOptions, multiple: int) -> list[Example]:
    """The first photographs, center-cropped to sides divisible by `multiple`; each is its own ground truth.

    Raises ImageError if there are none, ConfigError for one that is too small.
    """
    if not options.validation_steps:
        return []
    source = FolderPhotos((str(options.validation_hq_dir),))
    examples = []
    for number in range(min(options.num_validation_images, sum(source.group_sizes))):
        stored = source.fetch(number)
        image = _read(stored.hq, max(SMALLEST_PX, multiple))
        height, width = (side // multiple * multiple for side in image.shape[-2:])
        top, left = (image.shape[-2] - height) // 2, (image.shape[-1] - width) // 2
        image = image[..., top : top + height, left : left + width]
        examples.append(Example(_name(stored.hq, str(options.validation_hq_dir)), image, image))
    return examples


def restoration_examples(options: RestorationValidationOptions) -> list[Example]:
    """The first damaged photographs, with their ground truth if it is given.

    Raises ImageError if there are none, ConfigError for one that is too small.
    """
    if not options.validation_steps:
        return []
    lq_dir, hq_dir = str(options.validation_lq_dir), options.validation_hq_dir
    source = FolderPhotos((lq_dir,)) if hq_dir is None else FolderPhotos((hq_dir,), lq_folder=lq_dir)
    examples = []
    for number in range(min(options.num_validation_images, sum(source.group_sizes))):
        stored = source.fetch(number)
        first = _read(stored.hq)
        lq, hq = (first, None) if stored.lq is None else (_read(stored.lq, smallest=1), first)
        examples.append(Example(_name(stored.hq, hq_dir or lq_dir), lq, hq))
    return examples


def sample_examples(options: ValidationOptions, file: str | None) -> list[Example]:
    """The first samples of a file from generate_cfw_data.py. Raises ConfigError if it does not exist."""
    if not options.validation_steps:
        return []
    if file is None or not Path(file).is_file():
        raise ConfigError(
            f"validation_samples={file} is no file; give samples of photographs that are not trained on, "
            "written by generate_cfw_data.py"
        )
    with safe_open(file, "pt") as samples:
        hq, lq, latents = (samples.get_slice(name)[: options.num_validation_images] for name in ("hq", "lq", "latents"))
    return [
        Example(f"{i:03d}", pixels_to_image(lq[i].numpy()), pixels_to_image(hq[i].numpy()), latents[i : i + 1].float())
        for i in range(len(hq))
    ]


def reconstructed(vae: AutoencoderKL, example: Example) -> Tensor:
    """An example, reconstructed from the mean of its latent."""
    return vae.decode(vae.encode(example.lq).latent_dist.mean).sample


Restore = Callable[[Any, Example], Tensor]
"""(network in evaluation mode, example on its device) -> image (1, 3, H, W) in [-1, 1]."""

Measure = Callable[[np.ndarray, np.ndarray | None], dict[str, float]]
"""(pixels (H, W, 3), ground truth or None) -> metrics by name."""


class Validation:
    """Makes and measures the validation pictures of a run.

    part: the network that makes them, by the name it is saved under; for several names `restore` gets a dictionary.
    The pictures are written to output_dir/validation/step-NUMBER/NAME.png, the metrics of every step to
    output_dir/validation/metrics.jsonl.
    """

    def __init__(
        self,
        output_dir: Path,
        options: ValidationOptions,
        part: str | Sequence[str],
        examples: Sequence[Example],
        restore: Restore,
        measure: Measure,
    ) -> None:
        self.folder = output_dir / "validation"
        self.every = options.validation_steps
        self.part = part
        self.examples = examples
        self.restore = restore
        self.measure = measure
        self.records: StepRecords | None = None

    def resume(self, step: int) -> None:
        """Start after a step, 0 for a new run; records of later steps are dropped.

        Only the main process calls it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self.records = StepRecords(self.folder / "metrics.jsonl", step or -1)

    @torch.no_grad()
    def show(self, network: Any, step: int) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Write the pictures; returns mean metrics, and the pictures (H, W, 3) uint8 by name.

        Raises ConfigError if a result has not the size of its ground truth, OutputError.
        """
        first = network if isinstance(network, nn.Module) else next(iter(network.values()))
        device = next(first.parameters()).device
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices):  # random numbers of training stay the same
            pictures = {example.name: self._restored(network, example, device) for example in self.examples}
        metrics = {example.name: self._measured(example, pictures[example.name]) for example in self.examples}
        with replacing_folder(self.folder / f"step-{step:06d}") as folder:
            for name, pixels in pictures.items():
                Image.fromarray(pixels).save(folder / f"{name}.png")

        means = means_of(metrics.values())
        own = {f"{picture}/{name}": value for picture, values in metrics.items() for name, value in values.items()}
        assert self.records is not None  # the main process has resumed
        self.records.add(step, means | own)
        return means, pictures

    def _measured(self, example: Example, pixels: np.ndarray) -> dict[str, float]:
        truth = None if example.hq is None else image_to_pixels(example.hq)[0]
        if truth is not None and truth.shape != pixels.shape:
            raise ConfigError(
                f"validation picture {example.name} becomes {pixels.shape[0]}x{pixels.shape[1]} px, its truth has "
                f"{truth.shape[0]}x{truth.shape[1]}; give a truth of that size, or none"
            )
        return self.measure(pixels, truth)

    def _restored(self, network: Any, example: Example, device: torch.device) -> np.ndarray:
        hq, latent = (None if x is None else x.to(device) for x in (example.hq, example.latent))
        image = self.restore(network, Example(example.name, example.lq.to(device), hq, latent))
        return np.asarray(image_to_pixels(image.float().cpu())[0])


def _read(stored: Path | bytes, smallest: int = SMALLEST_PX) -> Tensor:
    pixels = np.asarray(decode(stored))
    if min(pixels.shape[:2]) < smallest:
        raise ConfigError(
            f"validation picture {stored!s} is {pixels.shape[0]}x{pixels.shape[1]} px, expected sides of at least "
            f"{smallest} px; leave it out"
        )
    return pixels_to_image(pixels)


def _name(photo: Path | bytes, folder: str) -> str:
    """Name of the result of a photograph: its path in the folder, with _ between the parts."""
    assert isinstance(photo, Path)  # it comes from a folder
    return "_".join(photo.relative_to(folder).with_suffix("").parts)
