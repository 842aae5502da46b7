"""The parts of FaceRefinement: detectors and the parser, by name, with weights read safely; and what enlarges the photo
before its faces are put back: plain resizing, StableSR, or any network of spandrel.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from stablesr_kit.checkpoints.networks import load_spandrel
from stablesr_kit.checkpoints.reading import read_checkpoint
from stablesr_kit.errors import ConfigError
from stablesr_kit.faces.detectors import WEIGHT_FILES, MTCNNDetector, RetinaFaceDetector, YuNetDetector
from stablesr_kit.faces.face import FaceDetector
from stablesr_kit.faces.paste import ParseNetParser
from stablesr_kit.imaging.canvas import Region, regions
from stablesr_kit.imaging.resizing import resize_bicubic
from stablesr_kit.spaces import image_to_unit, unit_to_image

if TYPE_CHECKING:
    from stablesr_kit.pipelines.one_step import OneStepPipeline
    from stablesr_kit.pipelines.stablesr import StableSRPipeline

DetectorName = Literal["mtcnn", "retinaface", "yunet"]


def load_detector(name: DetectorName, weights: Path | None = None, device: torch.device | str = "cpu") -> FaceDetector:
    """The detector of that name; nothing is ever downloaded.

    weights: file of the weights. None for mtcnn, whose weights are in the package, and for retinaface if facexlib
    has a copy.

    Raises:
        ConfigError: a file or an extra is missing, or a file is given for mtcnn.
        CheckpointError: the file is of another network.
    """
    if name == "mtcnn":
        if weights is not None:
            raise ConfigError(
                f"{weights} is given, but mtcnn has its weights in the package; leave the file out, or choose the "
                "detector it is for"
            )
        return MTCNNDetector(device=device)
    if name == "yunet":
        if weights is None:
            raise ConfigError(
                "the detector yunet needs its model; give face_detection_yunet_2023mar.onnx of OpenCV's zoo"
            )
        return YuNetDetector(weights)
    backbone: Literal["resnet50", "mobile0.25"] = "resnet50"
    if weights is not None and weights.name == WEIGHT_FILES["mobile0.25"]:
        backbone = "mobile0.25"
    path = weights or _facexlib_copy(WEIGHT_FILES[backbone])
    return RetinaFaceDetector(_tensors(path), backbone, device=device)


def load_parser(weights: Path, device: torch.device | str = "cpu") -> ParseNetParser:
    """ParseNet with the weights of parsing_parsenet.pth.

    Raises:
        ConfigError: the extra is not installed.
        CheckpointError: the file is missing, unsafe or of another network.
    """
    return ParseNetParser(_tensors(weights), device)


def _tensors(path: Path) -> dict[str, Tensor]:
    return {k: v for k, v in read_checkpoint(path).content.items() if isinstance(v, Tensor)}


def _facexlib_copy(file_name: str) -> Path:
    spec = importlib.util.find_spec("facexlib")
    if spec is None or spec.origin is None:
        raise ConfigError("the detector retinaface needs facexlib; pip install 'stablesr-kit[faces]', or use mtcnn")
    path = Path(spec.origin).parent / "weights" / file_name
    if not path.is_file():
        raise ConfigError(f"the detector retinaface needs its weights; give {file_name}, or put it at {path}")
    return path


# Side of the tiles that a network of another project takes at once, which bounds its memory, and what it sees around.
_TILE_PX, _HALO_PX = 512, 32


class Background(Protocol):
    """Enlarges a photo; `resize_bicubic` is the simplest one."""

    def __call__(self, image: Tensor, height: int, width: int) -> Tensor:
        """The image (B, 3, h, w) at the size (B, 3, height, width), both in [-1, 1]."""


class StableSRBackground:
    """The photo restored by a pipeline, with the same noise for every photo; as an upsampler, likewise each face.

    w: None is the model's own, and the only one of one-step models. progress: as a pipeline's `Job` takes it.
    """

    def __init__(
        self,
        pipeline: "StableSRPipeline | OneStepPipeline",
        w: float | None = None,
        seed: int = 0,
        progress: "Callable[[str, int, str], Any] | None" = None,
    ) -> None:
        self.pipeline, self.w, self.seed, self.progress = pipeline, w, seed, progress

    def __call__(self, image: Tensor, height: int | None = None, width: int | None = None) -> Tensor:
        """The image (B, 3, h, w) at the size (B, 3, height, width), both in [-1, 1].

        Without a size, as FaceRefinement's `upsampler` is called, it is enlarged by the model's working scale, and at
        least twice.
        """
        from stablesr_kit.pipelines.job import Job

        if height is None or width is None:
            factor = max(self.pipeline.config.working_scale, 2)
            height, width = (round(side * factor) for side in image.shape[-2:])
        generator = torch.Generator().manual_seed(self.seed)
        options = {} if self.w is None else {"w": self.w}
        restored = self.pipeline(
            image_to_unit(image),
            height=height,
            width=width,
            generator=generator,
            output_type="pt",
            job=Job(progress=self.progress),
            **options,
        ).images
        return kept_grey(unit_to_image(restored.cpu().float()), image)


class SpandrelUpsampler:
    """A super-resolution network of any architecture that spandrel knows (ESRGAN, SwinIR, DAT, ...).

    It enlarges by the network's own factor, in tiles. Called with a size, as a background, it then resizes to it;
    FaceRefinement's `upsampler` calls it without.

    Raises as `load_spandrel`.
    """

    def __init__(self, path: Path, device: torch.device | str = "cpu") -> None:
        self._model, self._device = load_spandrel(path, device), torch.device(device)

    @torch.no_grad()
    def __call__(self, image: Tensor, height: int | None = None, width: int | None = None) -> Tensor:
        """The image (B, 3, h, w) enlarged, and resized to (height, width) if they are given; both in [-1, 1]."""
        unit = image_to_unit(image)
        enlarged = kept_grey(unit_to_image(torch.stack([self._enlarged(one) for one in unit])), image)
        return enlarged if height is None or width is None else resize_bicubic(enlarged, height, width)

    def _enlarged(self, unit: Tensor) -> Tensor:
        """The picture (3, h, w) in [0, 1] enlarged by the network, tile by tile."""
        height, width = unit.shape[1:]
        enlarged = unit.new_empty(3, height * self._model.scale, width * self._model.scale)
        for tile in regions(height, width, _TILE_PX):
            outer = tile.grown(_HALO_PX, height, width)
            tile_there, outer_there = (Region(*(edge * self._model.scale for edge in one)) for one in (tile, outer))
            part = self._model(outer.crop(unit)[None].to(self._device))[0].clamp(0, 1)
            tile_there.crop(enlarged).copy_(tile_there.cut_from(part, outer_there))
        return enlarged


def kept_grey(enlarged: Tensor, image: Tensor) -> Tensor:
    """Images enlarged by a network (B, 3, H, W), made grey if the given image (B, 3, h, w) is exactly grey."""
    is_grey = (image == image[:, :1]).all(dim=(1, 2, 3)).to(enlarged.device)
    return torch.where(is_grey[:, None, None, None], enlarged.mean(dim=1, keepdim=True), enlarged)
